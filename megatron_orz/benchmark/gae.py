"""Generalised advantage estimation of many sequences: ours beside loops in Python and vectorised PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from megatron_orz.benchmark.group import OURS, Group, Row, faster_than
from megatron_orz.ops.gae import packed_gae

TASK = "gae"
LONGEST = 256
NUM_CHECKED_SEQUENCES = 64
GAMMA, GAE_LAMBDA = 0.99, 0.95


@dataclass(frozen=True)
class Pack:
    rewards: Tensor  # [T] float32
    values: Tensor  # [T] float32
    cu_seqlens: Tensor  # [B + 1] int32
    loss_mask: Tensor  # [T] bool

    @classmethod
    def random(cls, num_sequences: int, device: torch.device) -> "Pack":
        """Sequences of 1 to LONGEST tokens."""
        generator = torch.Generator(device).manual_seed(0)
        lengths = torch.randint(1, LONGEST + 1, (num_sequences,), generator=generator, device=device)
        rewards, values = torch.randn(2, int(lengths.sum()), generator=generator, device=device)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return cls(rewards, values, cu_seqlens, torch.ones_like(rewards, dtype=torch.bool))


Gae = Callable[[Pack], Tensor]
"""Advantages [T]; returns are computed with them."""


def group(num_sequences: int, device: torch.device) -> Group:
    pack = Pack.random(num_sequences, device)
    gaes: dict[str, Gae] = {
        OURS: _our_gae,
        "vectorised": _vectorised,
        "loop over sequences": _loop_over_sequences,
        "loop in plain floats": _loop_in_floats,
    }
    return Group(
        task=TASK,
        shape=f"{num_sequences} sequences of 1 to {LONGEST} tokens, {len(pack.rewards)} in all, float32",
        rows={
            name: Row(run=partial(gae, pack), errors=partial(_errors, gae, pack), note=NOTES[name])
            for name, gae in gaes.items()
        },
        limits={"advantage": 1e-3},
        our_limits={"advantage": 1e-5},
        targets=[faster_than("vectorised", 3), faster_than("loop over sequences", 100)],
    )


NOTES = {
    OURS: "with the moments of the advantages",
    "vectorised": "a step at a time, all sequences at once, padded",
    "loop over sequences": "a token at a time, on tensors",
    "loop in plain floats": "a token at a time, on lists",
}


def _our_gae(pack: Pack) -> Tensor:
    advantages, _, _ = packed_gae(
        pack.rewards, pack.values, pack.cu_seqlens, pack.loss_mask, gamma=GAMMA, gae_lambda=GAE_LAMBDA
    )
    return advantages


def _vectorised(pack: Pack) -> Tensor:
    lengths = pack.cu_seqlens.diff()
    position = torch.arange(LONGEST, device=lengths.device)
    is_token = position < lengths[:, None]
    rewards, values = (x.new_zeros(is_token.shape).masked_scatter_(is_token, x) for x in (pack.rewards, pack.values))
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(lengths))
    for t in range(LONGEST - 1, -1, -1):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * GAE_LAMBDA * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    returns = advantages + values
    del returns
    return advantages[is_token]


def _loop_over_sequences(pack: Pack) -> Tensor:
    lengths = pack.cu_seqlens.diff().tolist()
    advantages = torch.empty_like(pack.rewards)
    parts = (x.split(lengths) for x in (pack.rewards, pack.values, advantages))
    for rewards, values, out in zip(*parts, strict=True):
        advantage = next_value = 0.0
        for t in range(len(rewards) - 1, -1, -1):
            delta = rewards[t] + GAMMA * next_value - values[t]
            advantage = delta + GAMMA * GAE_LAMBDA * advantage
            out[t] = advantage
            next_value = values[t]
    returns = advantages + pack.values
    del returns
    return advantages


def _loop_in_floats(pack: Pack) -> Tensor:
    bounds, rewards, values = pack.cu_seqlens.tolist(), pack.rewards.tolist(), pack.values.tolist()
    advantages, returns = [0.0] * len(values), [0.0] * len(values)
    for begin, end in pairwise(bounds):
        advantage = next_value = 0.0
        for t in range(end - 1, begin - 1, -1):
            value = values[t]
            advantage = rewards[t] + GAMMA * next_value - value + GAMMA * GAE_LAMBDA * advantage
            advantages[t], returns[t] = advantage, advantage + value
            next_value = value
    result, _ = (torch.tensor(x, dtype=pack.values.dtype, device=pack.values.device) for x in (advantages, returns))
    return result


def _errors(gae: Gae, pack: Pack) -> dict[str, float]:
    """Largest absolute error of an advantage, over some sequences from the start."""
    bounds = pack.cu_seqlens[: NUM_CHECKED_SEQUENCES + 1]
    num_tokens = int(bounds[-1])
    part = Pack(pack.rewards[:num_tokens], pack.values[:num_tokens], bounds, pack.loss_mask[:num_tokens])
    expected = _loop_in_floats(Pack(part.rewards.double(), part.values.double(), bounds, part.loss_mask))
    return {"advantage": float((gae(part).double() - expected).abs().max())}
