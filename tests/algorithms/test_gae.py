"""The variants of generalised advantage estimation against sums of temporal-difference errors, token by token."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.gae import decoupled_gae, gae, length_adaptive_gae
from megatron_orz.types import PackedBatch
from tests.algorithms.packs import random_batch

# Responses of one token, of a few and of many, and a sequence without one, as padding is.
LENGTHS = [(2, 3), (1, 1), (4, 40), (3, 0), (2, 7)]
GAMMA = 0.97


def values_of(batch: PackedBatch) -> Tensor:
    return torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def by_definition(batch: PackedBatch, values: Tensor, lambda_of: Callable[[int], float]) -> Tensor:
    """A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}); lambda from the number of response tokens."""
    advantages = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        decay = GAMMA * lambda_of(int(batch.loss_mask[start:end].sum()))
        for t in range(start, end):
            deltas = [
                batch.rewards[s].item() + (GAMMA * values[s + 1].item() if s + 1 < end else 0.0) - values[s].item()
                for s in range(t, end)
            ]
            advantages.append(sum(decay**power * delta for power, delta in enumerate(deltas)))
    return torch.tensor(advantages, dtype=torch.float64)


@pytest.fixture
def batch() -> PackedBatch:
    batch = random_batch(LENGTHS)
    return PackedBatch(
        **{name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "rewards"},
        rewards=batch.rewards.double(),
    )


def assert_moments(moments: Tensor, advantages: Tensor, mask: Tensor) -> None:
    inside = advantages[mask]
    expected = [len(inside), inside.mean().item(), (inside - inside.mean()).square().sum().item()]
    assert moments.tolist() == pytest.approx(expected, rel=1e-9)


def test_gae_equals_its_definition(batch: PackedBatch) -> None:
    values = values_of(batch)
    advantages, returns, moments = gae(batch, values, gamma=GAMMA, gae_lambda=0.9)
    expected = by_definition(batch, values, lambda _: 0.9)
    torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(returns, expected + values, rtol=1e-10, atol=1e-10)
    assert_moments(moments, expected, batch.loss_mask)


@pytest.mark.parametrize("value_gae_lambda", [1.0, 0.9, 0.3])
def test_decoupled_gae_takes_advantages_by_one_lambda_and_returns_by_another(
    batch: PackedBatch, value_gae_lambda: float
) -> None:
    values = values_of(batch)
    advantages, returns, moments = decoupled_gae(
        batch, values, gamma=GAMMA, gae_lambda=0.9, value_gae_lambda=value_gae_lambda
    )
    expected = by_definition(batch, values, lambda _: 0.9)
    torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
    of_critic = by_definition(batch, values, lambda _: value_gae_lambda) + values
    torch.testing.assert_close(returns, of_critic, rtol=1e-10, atol=1e-10)
    assert_moments(moments, expected, batch.loss_mask)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 3.0])
def test_length_adaptive_gae_gives_every_response_its_lambda(batch: PackedBatch, alpha: float) -> None:
    """With alpha 0.05 only the response of 40 tokens is long enough for a positive lambda."""
    values = values_of(batch)
    advantages, returns, moments = length_adaptive_gae(batch, values, gamma=GAMMA, alpha=alpha, value_gae_lambda=1.0)
    expected = by_definition(batch, values, lambda n: max(0.0, 1 - 1 / (alpha * max(n, 1))))
    torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(returns, by_definition(batch, values, lambda _: 1.0) + values, rtol=1e-10, atol=1e-10)
    assert_moments(moments, expected, batch.loss_mask)
    if alpha == 0.05:
        first = batch.rewards[4] - values[4]
        assert advantages[4].item() == pytest.approx(first.item()), "lambda 0 leaves the temporal difference"


def test_without_values_every_token_gets_what_its_response_is_credited(batch: PackedBatch) -> None:
    advantages, _, _ = gae(batch, torch.zeros_like(batch.rewards), gamma=1.0, gae_lambda=1.0)
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        assert advantages[start:end].tolist() == pytest.approx([batch.rewards[start:end].sum().item()] * (end - start))
