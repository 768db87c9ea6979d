"""The longest previous factor, kernel and reference, against its definition by substrings."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.repetition import longest_previous_factor

Factor = Callable[[Tensor, Tensor], Tensor]
SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=24), max_size=4)


@pytest.fixture(scope="module", params=["kernel", "reference"])
def factor(request: pytest.FixtureRequest) -> Factor:
    if request.param == "kernel" and not extension.has_kernel("longest_previous_factor", "cpu"):
        pytest.skip("the C++ extension does not hold the kernel")
    return {"kernel": longest_previous_factor, "reference": reference.longest_previous_factor}[request.param]


def packed(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, sequences)], dtype=torch.int32)
    return torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64), lengths.cumsum(0, dtype=torch.int32)


def by_definition(s: list[int]) -> list[int]:
    """For each t the longest s[t : t + n] that is also s[u : u + n] for a u before t."""
    return [
        max((n for n in range(1, len(s) - t + 1) for u in range(t) if s[u : u + n] == s[t : t + n]), default=0)
        for t in range(len(s))
    ]


@given(SEQUENCES)
def test_it_is_the_longest_prefix_that_began_before(factor: Factor, sequences: list[list[int]]) -> None:
    assert factor(*packed(sequences)).tolist() == list(chain.from_iterable(map(by_definition, sequences)))


@pytest.mark.parametrize("num_symbols", [1, 2, 50, 150_000])
@pytest.mark.parametrize("period", [1, 3, 40, 700])
def test_long_sequences_agree_with_the_reference(num_symbols: int, period: int) -> None:
    """Random tokens, then a loop of `period` tokens: deep recursions of the sort, and shallow ones."""
    generator = torch.Generator().manual_seed(period)
    tokens = torch.randint(num_symbols, (1500,), generator=generator) * 1_000_003
    tokens[600:] = tokens[600 : 600 + period].repeat(900)[:900]
    cu_seqlens = torch.tensor([0, 1, 1, 1500], dtype=torch.int32)
    expected = reference.longest_previous_factor(tokens, cu_seqlens)
    assert longest_previous_factor(tokens, cu_seqlens).equal(expected)
    assert expected[600 + period :].tolist() == list(range(900 - period, 0, -1))


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 3]).int(), "tokens is float32"),
        (torch.zeros(3, 1).long(), torch.tensor([0, 3]).int(), r"\[3, 1\]"),
        (torch.zeros(3).long(), torch.tensor([0, 3]), "cu_seqlens is int64"),
        (torch.zeros(3).long(), torch.tensor([0, 4]).int(), r"to the 3 packed tokens, but is \[0, 4\]"),
        (torch.zeros(3).long(), torch.tensor([0, 2, 1, 3]).int(), r"\[0, 2, 1, 3\]"),
        (torch.zeros(0).long(), torch.zeros(0).int(), r"is \[\]"),
        (torch.zeros(3).long(), torch.zeros(2, device="meta").int(), r"cu_seqlens is int32 \[2\] on meta"),
    ],
)
def test_what_does_not_fit_together_is_refused(tokens: Tensor, cu_seqlens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        longest_previous_factor(tokens, cu_seqlens)
