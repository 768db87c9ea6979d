"""Attention over slots, kernel and reference, against softmax written out for each row and head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.slot_attention import slot_attention

Attention = Callable[..., Tensor]


@pytest.fixture(scope="module", params=["kernel", "reference"])
def attention(request: pytest.FixtureRequest) -> Attention:
    if request.param == "reference":
        return by_reference
    if not extension.has_kernel("slot_attention", "cpu"):
        pytest.skip("the C++ extension does not hold the kernel")
    return slot_attention


def by_reference(*tensors: Any, scale: float, window: int) -> Tensor:
    query, keys, values, slots, lengths = tensors
    return reference.slot_attention(query, keys, values, slots, lengths, scale, window)


def by_definition(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, *, scale: float, window: int
) -> Tensor:
    out = torch.empty_like(query)
    num_shared = query.shape[1] // keys.shape[1]
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        first = max(0, length - window) if window else 0
        for head in range(query.shape[1]):
            k, v = (x[slot, head // num_shared, first:length] for x in (keys, values))
            weights = (scale * (k @ query[row, head])).softmax(0)
            out[row, head] = weights @ v
    return out


# Heads of less than a vector, of one, of several and a tail; lengths around a vector; slots in any order, some unused.
@pytest.mark.parametrize(
    ("kv_heads", "num_shared", "head_dim"), [(1, 1, 1), (2, 1, 7), (2, 2, 8), (1, 3, 24), (3, 3, 67)]
)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_softmax_over_the_tokens_of_the_slot(
    attention: Attention, kv_heads: int, num_shared: int, head_dim: int, window: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, slots = torch.tensor([1, 33, 8, 9, 40, 2]), torch.tensor([6, 0, 3, 1, 5, 2])
    query = torch.randn(6, kv_heads * num_shared, head_dim, generator=generator, dtype=torch.float64)
    keys, values = 3 * torch.randn(2, 7, kv_heads, 40, head_dim, generator=generator, dtype=torch.float64)
    expected = by_definition(query, keys, values, slots, lengths, scale=0.3, window=window)
    inputs = (x.to(dtype) for x in (query, keys, values))
    actual = attention(*inputs, slots, lengths, scale=0.3, window=window)
    assert actual.dtype == dtype
    # exp is exact to 2 units in the last place, the sums to about as many as they have terms.
    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_large_scores_do_not_overflow(attention: Attention) -> None:
    query, keys = torch.full((1, 1, 8), 100.0), torch.full((1, 1, 3, 8), 100.0)
    keys[0, 0, 2] = -100.0
    values = torch.arange(24.0).view(1, 1, 3, 8)
    actual = attention(query, keys, values, torch.tensor([0]), torch.tensor([3]), scale=1.0, window=0)
    torch.testing.assert_close(actual[0], values[0, :, :2].mean(1))


@pytest.mark.skipif(extension.NOT_BUILT is not None, reason="the C++ extension is not built")
def test_what_does_not_fit_is_refused() -> None:
    keys = torch.zeros(2, 2, 4, 8)
    for slots, lengths in (([2], [1]), ([-1], [1]), ([0], [5]), ([0], [0])):
        with pytest.raises(
            ValueError, match=rf"row 0 has {lengths[0]} tokens in slot {slots[0]}; there are 2 slots of 4"
        ):
            slot_attention(torch.zeros(1, 2, 8), keys, keys, torch.tensor(slots), torch.tensor(lengths), scale=1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key-value heads"):
        slot_attention(torch.zeros(1, 3, 8), keys, keys, torch.tensor([0]), torch.tensor([1]), scale=1.0)
