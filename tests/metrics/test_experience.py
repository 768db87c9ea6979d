"""Metrics of a step's estimates: the same however the packs are dealt over ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean
from threading import Barrier

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.advantages import estimate
from megatron_orz.algorithms.gae import gae
from megatron_orz.metrics.experience import experience_metrics
from megatron_orz.metrics.importance import importance_metrics
from megatron_orz.types import ImportanceLevel, Metrics, PackedBatch

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [[4, 7], [5], [1, 9, 3], [6]]

ESTIMATOR = partial(gae, gamma=1.0, gae_lambda=0.9)


class ThreadRanks:
    """Data-parallel ranks that are threads of this process."""

    pack_multiple = 1

    def __init__(self, dp_rank: int, gathered: list[Tensor], barrier: Barrier) -> None:
        self.dp_rank, self.dp_size = dp_rank, len(gathered)
        self.gathered, self.barrier = gathered, barrier

    def dp_all_gather(self, tensor: Tensor) -> Tensor:
        self.gathered[self.dp_rank] = tensor
        self.barrier.wait(timeout=120)
        stacked = torch.stack(self.gathered)
        self.barrier.wait(timeout=120)
        return stacked


def pack(lengths: list[int], generator: torch.Generator) -> tuple[PackedBatch, Tensor, Tensor]:
    """A pack with the policy's log-probabilities and the critic's values; rewards 0 or 1 at the ends."""
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rewards = torch.zeros(total)
    rewards[cu_seqlens[1:].long() - 1] = torch.randint(2, (len(lengths),), generator=generator).float()
    loss_mask = torch.rand(total, generator=generator) < 0.7
    loss_mask[cu_seqlens[1:].long() - 1] = True
    rollout_log_probs, old_log_probs, values = torch.randn(3, total, generator=generator)
    batch = PackedBatch(
        tokens=torch.zeros(total, dtype=torch.int64),
        targets=torch.zeros(total, dtype=torch.int64),
        position_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        loss_mask=loss_mask,
        rewards=rewards,
        rollout_log_probs=rollout_log_probs,
    )
    return batch, old_log_probs, values


def metrics_of(
    shares: Sequence[Sequence[tuple[PackedBatch, Tensor, Tensor]]], level: ImportanceLevel | None = None
) -> Metrics:
    """Rank i holds share i. level: of the importance weights, whose metrics are then asked for."""
    gathered: list[Tensor] = [torch.zeros(0)] * len(shares)
    barrier = Barrier(len(shares))

    def of_rank(rank: int) -> Metrics:
        batches, log_probs, values = zip(*shares[rank], strict=True)
        experience, moments = estimate(batches, log_probs, values, log_probs, estimator=ESTIMATOR)
        ranks = ThreadRanks(rank, gathered, barrier)
        if level is not None:
            return importance_metrics(experience, ranks, cap=1.5, level=level)
        return experience_metrics(experience, moments, ranks, has_critic=True)

    with ThreadPoolExecutor(len(shares)) as pool:
        first, *others = pool.map(of_rank, range(len(shares)))
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_metrics_are_those_of_all_response_tokens(num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    packs = [pack(lengths, generator) for lengths in LENGTHS]
    metrics = metrics_of([packs[rank::num_ranks] for rank in range(num_ranks)])

    batches, log_probs, values = zip(*packs, strict=True)
    experience, _ = estimate(batches, log_probs, values, log_probs, estimator=ESTIMATOR)
    mismatch = torch.cat([(e.rollout_log_probs - e.old_log_probs).abs()[e.loss_mask] for e in experience]).double()
    advantages = torch.cat([e.advantages[e.loss_mask] for e in experience]).double()
    returns = torch.cat([e.returns[e.loss_mask] for e in experience]).double()
    errors = returns - torch.cat([e.old_values[e.loss_mask] for e in experience])
    assert metrics == pytest.approx(
        {
            "log_prob_mismatch/mean": mismatch.mean().item(),
            "log_prob_mismatch/max": mismatch.max().item(),
            "advantage/mean": advantages.mean().item(),
            "advantage/std": advantages.std(correction=0).item(),
            "advantage/positive_share": (advantages > 0).double().mean().item(),
            "critic/explained_variance": 1 - (errors.var() / returns.var()).item(),
        }
    )


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_metrics_equal_their_definition(num_ranks: int, level: ImportanceLevel) -> None:
    generator = torch.Generator().manual_seed(1)
    packs = [pack(lengths, generator) for lengths in LENGTHS]
    metrics = metrics_of([packs[rank::num_ranks] for rank in range(num_ranks)], level)

    tokens, sequences = [], []
    for batch, log_probs, _ in packs:
        bounds = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):
            logs = [float(log_probs[t] - batch.rollout_log_probs[t]) for t in range(start, end) if batch.loss_mask[t]]
            tokens += [math.exp(log) for log in logs]
            sequences += [math.exp(sum(logs))] * len(logs)
    weighed = tokens if level == "token" else sequences
    assert metrics == pytest.approx(
        {
            "importance/ratio": fmean(tokens),
            "importance/ratio_max": max(tokens),
            "importance/sequence_ratio": fmean(sequences),
            "importance/sequence_ratio_max": max(sequences),
            "importance/kl": fmean(ratio - 1 - math.log(ratio) for ratio in tokens),
            "importance/clip_share": fmean(ratio > 1.5 for ratio in weighed),
        },
        rel=1e-4,
    )
