"""`packed_gae` and the moments of advantages under the emulator, against float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.csrc.emulation import FLOAT32, FLOAT64, poison, run, workspace

DTYPES = {FLOAT32: np.float32, FLOAT64: np.float64}

# Around a thread's four tokens, a warp's 128 and a block's 1024; several tiles; nothing.
LENGTHS = [[1], [2, 1, 3], [31, 32, 33], [4, 5, 0, 127, 128, 129], [255, 256, 257], [1023, 1024, 1025], [8193, 1], [0]]


def pack(lengths: list[int], dtype: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(sum(lengths))
    rewards, values = random.normal(size=(2, sum(lengths))).astype(DTYPES[dtype])
    return rewards, values, np.cumsum([0, *lengths]).astype(np.int32)


def define(
    rewards: np.ndarray, values: np.ndarray, cu_seqlens: np.ndarray, gamma: float, gae_lambda: float
) -> np.ndarray:
    advantages = np.zeros(len(rewards))
    for begin, end in pairwise(cu_seqlens):
        advantage = next_value = 0.0
        for t in range(end - 1, begin - 1, -1):
            advantage = float(rewards[t]) + gamma * next_value - float(values[t]) + gamma * gae_lambda * advantage
            next_value = float(values[t])
            advantages[t] = advantage
    return advantages


def run_gae(
    rewards: np.ndarray,
    values: np.ndarray,
    cu_seqlens: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages, returns and moments, of all tokens by default."""
    mask = np.ones(len(rewards), bool) if mask is None else mask
    advantages, returns = poison(len(rewards), dtype=rewards.dtype), poison(len(rewards), dtype=rewards.dtype)
    moments, num_sequences = poison(3, dtype=np.float64), len(cu_seqlens) - 1
    dtype = FLOAT32 if rewards.dtype == np.float32 else FLOAT64
    run(
        "packed_gae", rewards, values, dtype, cu_seqlens, mask, advantages, returns, moments,
        workspace("packed_gae", num_sequences), num_sequences, gamma, gae_lambda,
    )  # fmt: skip
    return advantages, returns, moments


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_packed_gae_equals_definition(dtype: int, lengths: list[int], gamma: float, gae_lambda: float) -> None:
    rewards, values, cu_seqlens = pack(lengths, dtype)
    expected = define(rewards, values, cu_seqlens, gamma, gae_lambda)
    advantages, returns, _ = run_gae(rewards, values, cu_seqlens, gamma=gamma, gae_lambda=gae_lambda)
    # Carried in float64 and rounded once.
    rtol, atol = (1.2e-7, 1e-10) if dtype == FLOAT32 else (1e-12, 1e-11)
    np.testing.assert_allclose(advantages, expected, rtol=rtol, atol=atol)
    np.testing.assert_allclose(returns, expected + values, rtol=rtol, atol=atol)


def test_the_undiscounted_return_of_every_token_is_the_reward() -> None:
    num_tokens = 20_000
    values = np.random.default_rng(0).normal(size=num_tokens).astype(np.float32)
    rewards = np.zeros(num_tokens, np.float32)
    rewards[-1] = 1
    cu_seqlens = np.array([0, num_tokens], np.int32)
    _, returns, _ = run_gae(rewards, values, cu_seqlens, gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(returns, 1, rtol=0, atol=1e-7)


def define_moments(x: np.ndarray) -> list[float]:
    x = x.astype(np.float64)
    return [len(x), x.mean(), ((x - x.mean()) ** 2).sum()] if len(x) else [0, 0, 0]


# More sequences than a block has threads, and of many lengths; one sequence; none.
@pytest.mark.parametrize("lengths", [[5, 0, 300, 1, 2100], [i % 7 for i in range(300)], [40], []], ids=len)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_gae_brings_the_moments_of_the_advantages_under_the_mask(dtype: int, lengths: list[int]) -> None:
    rewards, values, cu_seqlens = pack(lengths, dtype)
    # Advantages far from zero, but alike: sums of squares would cancel.
    rewards += 1e4 * (1 - 0.99 * 0.95)
    mask = np.random.default_rng(1).random(len(rewards)) < 0.6
    if len(lengths) == 5:
        mask[cu_seqlens[3]] = False  # the sequence of one token has none
    advantages, _, moments = run_gae(rewards, values, cu_seqlens, mask, gamma=0.99, gae_lambda=0.95)
    np.testing.assert_allclose(moments, define_moments(advantages[mask]), rtol=1e-10)


def test_gae_without_a_masked_token_has_empty_moments() -> None:
    rewards, values, cu_seqlens = pack([3, 40], FLOAT32)
    *_, moments = run_gae(rewards, values, cu_seqlens, np.zeros(43, bool), gamma=1.0, gae_lambda=1.0)
    np.testing.assert_array_equal(moments, [0, 0, 0])
