"""Whitening, estimation and explained variance, whole and split over ranks."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.advantages import (
    estimate,
    explained_variance,
    whiten,
    whiten_advantages,
)
from megatron_orz.algorithms.gae import gae
from megatron_orz.ops.moments import combine_moments, masked_moments
from megatron_orz.types import Experience
from tests.algorithms.packs import random_batch, random_experience

MONTE_CARLO = partial(gae, gamma=1.0, gae_lambda=1.0)
LENGTHS = [[(2, 3), (1, 1), (4, 6)], [(3, 5)], [(1, 2), (5, 0), (2, 7)], [(4, 4), (1, 9)]]


def alone(moments: Tensor) -> Tensor:
    """The exchange of a single rank."""
    return moments[None]


def moments_of(experiences: list[Experience]) -> Tensor:
    """As `estimate` returns them."""
    parts = [masked_moments(e.advantages, e.loss_mask) for e in experiences]
    return combine_moments(torch.stack([torch.zeros(3, dtype=torch.float64), *parts]))


def response_tokens(experiences: list[Experience], name: str) -> Tensor:
    return torch.cat([getattr(e, name)[e.loss_mask] for e in experiences]).double()


def test_whitened_entries_have_mean_0_and_variance_1_and_the_rest_is_0() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 5
    mask = torch.arange(500) % 3 > 0
    whitened = whiten(x, mask, masked_moments(x, mask))
    inside = whitened[mask].double()
    assert whitened.dtype == torch.float32
    assert inside.mean().item() == pytest.approx(0, abs=1e-6)
    assert inside.square().mean().item() == pytest.approx(1, abs=1e-6)
    assert whitened[~mask].abs().max() == 0
    # Shift and scale only: the order and the ratios of differences stay.
    torch.testing.assert_close(
        inside.diff() / inside.diff()[0], (x[mask].diff() / x[mask].diff()[0]).double(), rtol=1e-3, atol=1e-3
    )


def test_equal_advantages_whiten_to_0_rather_than_to_amplified_rounding() -> None:
    x = torch.full((7,), 0.1)
    mask = torch.ones(7, dtype=torch.bool)
    assert whiten(x, mask, masked_moments(x, mask)).abs().max() < 1e-6


@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_whitening_split_over_ranks_equals_the_whole(split: int) -> None:
    packs = [random_experience(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    whole = [e.advantages for e in whiten_advantages(packs, moments_of(packs), alone)]
    ranks = [packs[:split], packs[split:]]

    exchanged: list[Tensor] = []

    def record(moments: Tensor) -> Tensor:
        exchanged.append(moments)
        return moments[None]

    for rank in ranks:
        whiten_advantages(rank, moments_of(rank), record)
    assert [len(moments) for moments in exchanged] == [3, 3], "each rank exchanges three numbers, even without packs"

    parts = [whiten_advantages(rank, moments_of(rank), lambda _: torch.stack(exchanged)) for rank in ranks]
    torch.testing.assert_close([e.advantages for part in parts for e in part], whole, rtol=0, atol=1e-6)
    everything = torch.cat(whole)[torch.cat([e.loss_mask for e in packs])].double()
    assert everything.square().mean().item() == pytest.approx(1, abs=1e-6)


def test_estimate_gives_each_response_token_its_return() -> None:
    """gamma = lambda = 1: the return is the rollout's reward, the advantage what the value missed of it."""
    batches = [random_batch(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    values = [torch.randn(len(b.tokens), generator=torch.Generator().manual_seed(9)) for b in batches]
    log_probs = [torch.full_like(v, -1.5) for v in values]
    experiences, moments = estimate(batches, log_probs, values, log_probs, estimator=MONTE_CARLO)
    advantages = response_tokens(experiences, "advantages")
    expected_moments = [
        len(advantages),
        advantages.mean().item(),
        (advantages - advantages.mean()).square().sum().item(),
    ]
    assert moments.tolist() == pytest.approx(expected_moments, rel=1e-12)
    for experience, batch, value in zip(experiences, batches, values, strict=True):
        bounds = batch.cu_seqlens.tolist()
        rewards = torch.cat([batch.rewards[a:b].sum().expand(b - a) for a, b in pairwise(bounds)])
        torch.testing.assert_close(experience.returns, rewards, rtol=0, atol=1e-5)
        torch.testing.assert_close(experience.advantages, rewards - value, rtol=0, atol=1e-5)
        assert experience.old_values is value
        assert experience.ref_log_probs is experience.old_log_probs
        assert experience.targets is batch.targets


def test_estimate_discounts() -> None:
    batch = random_batch([(1, 3)])
    values = torch.tensor([0.1, 0.2, 0.3, 0.4])
    (experience,), _ = estimate(
        [batch], [values], [values], [values], estimator=partial(gae, gamma=0.9, gae_lambda=0.5)
    )
    last = batch.rewards[3] - 0.4
    expected = [(0.9 * 0.3 - 0.2) + 0.45 * ((0.9 * 0.4 - 0.3) + 0.45 * last), (0.9 * 0.4 - 0.3) + 0.45 * last, last]
    torch.testing.assert_close(experience.advantages[1:], torch.stack([torch.as_tensor(e) for e in expected]))


def test_explained_variance_is_over_the_response_tokens_of_all_ranks() -> None:
    packs = [random_experience(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    returns, values = response_tokens(packs, "returns"), response_tokens(packs, "old_values")
    expected = 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item()
    assert explained_variance(packs, alone) == pytest.approx(expected, abs=1e-6)

    others = iter(
        [
            masked_moments(x, torch.ones_like(x, dtype=torch.bool))
            for x in (
                response_tokens(packs[2:], "returns"),
                response_tokens(packs[2:], "returns") - response_tokens(packs[2:], "old_values"),
            )
        ]
    )
    split = explained_variance(packs[:2], lambda moments: torch.stack([moments, next(others)]))
    assert split == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_constant_returns_is_undefined() -> None:
    zeros = torch.zeros(5)
    (pack,), _ = estimate([random_batch([(2, 3)])], [zeros], [torch.randn(5)], [zeros], estimator=MONTE_CARLO)
    assert math.isnan(explained_variance([pack], alone))
