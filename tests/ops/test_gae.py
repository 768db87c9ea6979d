"""Packed GAE, kernel and reference, against the O(n^2) definition in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.gae import packed_gae
from megatron_orz.ops.moments import combine_moments

Gae = Callable[..., tuple[Tensor, Tensor, Tensor]]
Pack = tuple[Tensor, Tensor, Tensor, Tensor]
IMPLEMENTATIONS = {"kernel": packed_gae, "reference": reference.packed_gae}
needs_kernel = pytest.mark.skipif(extension.NOT_BUILT is not None, reason="the C++ extension is not built")


@pytest.fixture(params=["kernel", "reference"])
def gae(request: pytest.FixtureRequest) -> Gae:
    if request.param == "kernel" and extension.NOT_BUILT is not None:
        pytest.skip("the C++ extension is not built")
    return IMPLEMENTATIONS[request.param]


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def random_pack(lengths: list[int], dtype: torch.dtype, seed: int = 0) -> Pack:
    """rewards, values, cu_seqlens, loss_mask."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64).to(dtype)
    return rewards, values, cu_seqlens_of(lengths), torch.rand(sum(lengths), generator=generator) < 0.7


def gae_by_definition(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, every term written out, in Python floats."""
    advantages = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        r, v = r.double().tolist(), [*v.double().tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        advantages += [
            sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
        ]
    return advantages, [a + v for a, v in zip(advantages, values.double().tolist(), strict=True)]


# Awkward sizes: single tokens, neighbours of powers of two, an empty sequence, long next to short.
LENGTHS = [[1], [1, 1, 1], [2, 1, 3], [7, 8, 9], [1, 33, 1, 63, 64, 65, 1], [5, 0, 4], [300, 1, 2]]
DISCOUNTS = [(1.0, 1.0), (0.99, 0.95), (1.0, 0.95), (0.9, 1.0), (1.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), DISCOUNTS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_gae_equals_definition(
    gae: Gae, lengths: list[int], dtype: torch.dtype, gamma: float, gae_lambda: float
) -> None:
    rewards, values, cu_seqlens, loss_mask = random_pack(lengths, dtype)
    advantages, returns, _ = gae(rewards, values, cu_seqlens, loss_mask, gamma=gamma, gae_lambda=gae_lambda)
    expected_advantages, expected_returns = gae_by_definition(rewards, values, lengths, gamma, gae_lambda)
    # A sum of up to 300 unit terms: 300 roundings of its largest partial sum (about 30) bound the float32 error.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-11
    assert advantages.dtype == returns.dtype == dtype
    torch.testing.assert_close(
        advantages.double(), torch.tensor(expected_advantages, dtype=torch.float64), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        returns.double(), torch.tensor(expected_returns, dtype=torch.float64), rtol=0, atol=tolerance
    )


def test_undiscounted_reward_at_the_end_reaches_every_token_of_its_sequence_only(gae: Gae) -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    values = torch.tensor([0.25, 0.5, 0.75, 0.5, -0.5])
    mask = torch.tensor([False, True, True, False, True])
    advantages, returns, moments = gae(rewards, values, cu_seqlens_of([3, 2]), mask, gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert advantages.tolist() == [0.75, 0.5, 0.25, -0.5, 0.5]
    assert moments.tolist() == pytest.approx([3, 1.25 / 3, 0.25 + 0.0625 + 0.25 - 1.25**2 / 3])


def test_neighbours_in_a_pack_do_not_touch_each_other(gae: Gae) -> None:
    lengths = [4, 1, 6]
    rewards, values, cu_seqlens, loss_mask = random_pack(lengths, torch.float64)
    *packed, moments = gae(rewards, values, cu_seqlens, loss_mask, gamma=0.9, gae_lambda=0.8)
    alone = [
        gae(*arrays[:2], cu_seqlens_of([len(arrays[0])]), arrays[2], gamma=0.9, gae_lambda=0.8)
        for arrays in zip(*(x.split(lengths) for x in (rewards, values, loss_mask)), strict=True)
    ]
    *of_sequences, parts = zip(*alone, strict=True)
    for of_pack, of_each in zip(packed, of_sequences, strict=True):
        torch.testing.assert_close(of_pack, torch.cat(of_each), rtol=0, atol=1e-14)
    torch.testing.assert_close(moments, combine_moments(torch.stack(parts)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["near-0", "far-from-0"])
def test_moments_are_those_of_the_advantages_under_the_mask(gae: Gae, offset: float) -> None:
    """Whatever lies outside the mask, even a value that is not a number; and from a mean that is far from 0."""
    rewards, values, cu_seqlens, loss_mask = random_pack([5, 1, 300, 0, 77], torch.float64)
    rewards = rewards + offset
    loss_mask[:5], values[0] = False, float("nan")  # of the first sequence, which nothing else depends on
    advantages, _, moments = gae(rewards, values, cu_seqlens, loss_mask, gamma=0.5, gae_lambda=0.5)
    counted = advantages[loss_mask]
    expected = torch.stack([loss_mask.sum().double(), counted.mean(), (counted - counted.mean()).square().sum()])
    assert advantages[0].isnan()
    torch.testing.assert_close(moments, expected, rtol=1e-9, atol=0)


def test_a_pack_without_loss_tokens_has_moments_0(gae: Gae) -> None:
    for lengths in ([], [0], [4, 2]):
        rewards, values, cu_seqlens, loss_mask = random_pack(lengths, torch.float32)
        *_, moments = gae(rewards, values, cu_seqlens, loss_mask & False, gamma=0.9, gae_lambda=0.8)
        assert moments.tolist() == [0.0, 0.0, 0.0]
        assert moments.dtype == torch.float64


@needs_kernel
@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_kernel_equals_reference(lengths: list[int], gamma: float, gae_lambda: float, seed: int) -> None:
    pack = random_pack(lengths, torch.float64, seed)
    expected = reference.packed_gae(*pack, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(packed_gae(*pack, gamma=gamma, gae_lambda=gae_lambda), expected, rtol=1e-12, atol=1e-12)


@needs_kernel
def test_kernel_stays_exact_over_long_responses() -> None:
    """At gamma = lambda = 1 the return of every token is the reward, whatever the 20,000 values in between are."""
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    rewards = torch.zeros(20_000)
    rewards[-1] = 1.0
    mask = torch.ones(20_000, dtype=torch.bool)
    _, returns, _ = packed_gae(rewards, values, cu_seqlens_of([20_000]), mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.ones(20_000), rtol=0, atol=1e-7)


@needs_kernel
def test_kernel_is_right_when_many_sequences_are_shared_by_threads() -> None:
    lengths = [1 + 37 * i % 211 for i in range(1000)]
    pack = random_pack(lengths, torch.float64)
    expected = reference.packed_gae(*pack, gamma=0.99, gae_lambda=0.95)
    actual = packed_gae(*pack, gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-12, atol=0)


@needs_kernel
def test_kernel_reads_strided_inputs() -> None:
    rewards, values, cu_seqlens, loss_mask = random_pack([3, 5], torch.float64)
    strided = torch.stack([rewards, values], dim=1)
    mask = torch.stack([loss_mask, ~loss_mask], dim=1)[:, 0]
    expected = packed_gae(rewards, values, cu_seqlens, loss_mask, gamma=0.9, gae_lambda=0.8)
    actual = packed_gae(strided[:, 0], strided[:, 1], cu_seqlens, mask, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@needs_kernel
def test_op_is_registered_correctly() -> None:
    """Schema, fake tensors, dispatch and compilation of the registered op."""
    torch.library.opcheck(
        torch.ops.megatron_orz.packed_gae.default, (*random_pack([3, 1, 5], torch.float32), 0.99, 0.95)
    )


def test_an_unbuilt_extension_falls_back_on_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    extension.has_kernel.cache_clear()
    monkeypatch.setattr(extension, "NOT_BUILT", "no module named _C")
    pack = random_pack([3, 4], torch.float64)
    expected = reference.packed_gae(*pack, gamma=0.9, gae_lambda=0.8)
    for _ in range(2):
        actual = packed_gae(*pack, gamma=0.9, gae_lambda=0.8)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [record.getMessage() for record in caplog.records] == [
        "packed_gae: the extension is not built (no module named _C); running the slower PyTorch reference"
    ]
    extension.has_kernel.cache_clear()


def bad(**changes: Tensor) -> dict[str, Tensor]:
    good = {
        "rewards": torch.zeros(3),
        "values": torch.zeros(3),
        "cu_seqlens": cu_seqlens_of([1, 2]),
        "loss_mask": torch.ones(3, dtype=torch.bool),
    }
    return {**good, **changes}


BAD_INPUTS = {
    "shapes differ": (bad(values=torch.zeros(4)), r"float32 \[4\]"),
    "two dimensions": (bad(rewards=torch.zeros(3, 1), values=torch.zeros(3, 1)), r"\[3, 1\]"),
    "types differ": (bad(values=torch.zeros(3).double()), "float64"),
    "integers": (bad(rewards=torch.zeros(3).int(), values=torch.zeros(3).int()), "int32"),
    "long boundaries": (bad(cu_seqlens=cu_seqlens_of([1, 2]).long()), "int64"),
    "ends early": (bad(cu_seqlens=cu_seqlens_of([1, 1])), r"0 to the 3 packed tokens, but is \[0, 1, 2\]"),
    "starts late": (bad(cu_seqlens=torch.tensor([1, 3], dtype=torch.int32)), r"\[1, 3\]"),
    "falls": (bad(cu_seqlens=torch.tensor([0, 5, 3], dtype=torch.int32)), r"\[0, 5, 3\]"),
    "mask of numbers": (bad(loss_mask=torch.ones(3)), r"loss_mask is float32 \[3\] on cpu"),
    "short mask": (bad(loss_mask=torch.ones(2, dtype=torch.bool)), r"loss_mask is bool \[2\]"),
    "no boundaries": (bad(cu_seqlens=torch.tensor([], dtype=torch.int32)), r"\[\]"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused_with_their_values(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_gae(**inputs, gamma=1.0, gae_lambda=1.0)


@needs_kernel
@pytest.mark.parametrize("inputs", [given[0] for given in BAD_INPUTS.values()], ids=BAD_INPUTS)
def test_the_kernel_itself_reads_nothing_outside_its_arrays(inputs: dict[str, Tensor]) -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        torch.ops.megatron_orz.packed_gae(*inputs.values(), 1.0, 1.0)
