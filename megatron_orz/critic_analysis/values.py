"""A critic's values of the states that generations pass through, and the advantages of their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForTokenClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megatron_orz.generations import Generation
from megatron_orz.metrics.repetition import repeated_tokens
from megatron_orz.ops.gae import packed_gae

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ValuedResponse:
    """A response of n >= 1 tokens with what the critic says of it."""

    generation: Generation
    values: Floats  # [n], V of the state from which token t is chosen
    advantages: Floats  # [n], by GAE, not whitened
    is_repeated: NDArray[np.bool_]  # [n], token t lies in a stretch that was there before


def load_critic(path: Path, *, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A critic as a token classifier with one label (docs/checkpoints.md), and its tokenizer.

    Raises ValueError for another directory, such as a policy's, to which transformers would add a random head.
    """
    config_file = path / "config.json"
    if not config_file.exists():
        raise ValueError(f"{path} holds no config.json; give a critic's Hugging Face checkpoint, such as final-critic/")
    config = json.loads(config_file.read_text())
    architectures = config.get("architectures") or ["nothing"]
    if not architectures[0].endswith("ForTokenClassification") or len(config.get("id2label", {})) != 1:
        raise ValueError(
            f"{path} is no critic: its config.json names {architectures[0]} with {len(config.get('id2label', {}))} "
            "labels, not a token classifier with one; give a critic's checkpoint, such as final-critic/"
        )
    disable_progress_bar()
    critic = AutoModelForTokenClassification.from_pretrained(path, local_files_only=True).to(device).eval()
    return critic, AutoTokenizer.from_pretrained(path, local_files_only=True)


def value_responses(
    critic: PreTrainedModel,
    generations: Sequence[Generation],
    *,
    gamma: float,
    gae_lambda: float,
    min_repeat_tokens: int,
    max_batch_tokens: int,
    on_response: Callable[[], None] = lambda: None,
) -> list[ValuedResponse]:
    """Values, advantages and repeated tokens of each generation that holds a token, in their order.

    Raises ValueError for tokens that the critic does not know.
    """
    generations = [generation for generation in generations if generation.response_ids]
    vocab_size = critic.get_input_embeddings().num_embeddings
    largest = max((max(g.prompt_ids + g.response_ids) for g in generations), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"the generations hold the token {largest}, but the critic knows {vocab_size}; "
            "give a critic with the tokenizer of the policy that generated them"
        )
    values: list[Floats | None] = [None] * len(generations)
    for batch in _batches(generations, max_batch_tokens):
        for index, of_response in zip(batch, _values_of([generations[i] for i in batch], critic), strict=True):
            values[index] = of_response
            on_response()
    known = [of_response for of_response in values if of_response is not None]
    advantages = _advantages_of(generations, known, gamma=gamma, gae_lambda=gae_lambda)
    return [
        ValuedResponse(
            generation=generation,
            values=values,
            advantages=advantages,
            is_repeated=repeated_tokens(generation.response_ids, min_tokens=min_repeat_tokens),
        )
        for generation, values, advantages in zip(generations, known, advantages, strict=True)
    ]


def _batches(generations: Sequence[Generation], max_tokens: int) -> Iterator[list[int]]:
    """Indices of generations of similar length, as many together as padded fit into `max_tokens`, but at least one."""
    lengths = [len(g.prompt_ids) + len(g.response_ids) for g in generations]
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _values_of(generations: Sequence[Generation], critic: PreTrainedModel) -> Iterator[Floats]:
    rows = [torch.tensor([*g.prompt_ids, *g.response_ids]) for g in generations]
    # The padding comes after all that is asked for, where causal attention does not look.
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(critic.device)
    values = critic(input_ids=tokens, use_cache=False).logits[..., 0].float().cpu().numpy()
    for row, generation in zip(values, generations, strict=True):
        start = len(generation.prompt_ids) - 1
        yield row[start : start + len(generation.response_ids)]


def _advantages_of(
    generations: Sequence[Generation], values: Sequence[Floats], *, gamma: float, gae_lambda: float
) -> list[Floats]:
    bounds = list(accumulate(map(len, values), initial=0))
    rewards = torch.zeros(bounds[-1])
    rewards[torch.tensor(bounds[1:], dtype=torch.int64) - 1] = torch.tensor([g.reward for g in generations])
    everywhere = torch.ones(bounds[-1], dtype=torch.bool)
    packed = torch.from_numpy(np.concatenate([*values, np.zeros(0, dtype=np.float32)]))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    advantages, _, _ = packed_gae(rewards, packed, cu_seqlens, everywhere, gamma=gamma, gae_lambda=gae_lambda)
    return np.split(advantages.numpy(), bounds[1:-1]) if values else []
