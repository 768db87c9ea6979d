"""Packed attention in all its forms equals causal attention one sequence at a time, in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.engine import attention
from megatron_orz.engine.context import ContextSlice, slice_context

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = 1 / math.sqrt(HEAD_DIM)
PACKS = [[1], [5, 1, 17, 8], [3] * 9, [40, 2]]


@dataclass(frozen=True)
class Ranks:
    """Stands for a process group: slicing a pack needs no more of it."""

    num: int
    mine: int

    def size(self) -> int:
        return self.num

    def rank(self) -> int:
        return self.mine


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v of one sequence [n, heads, d], whose last query sees every key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    is_visible = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_visible, -torch.inf).softmax(-1), v)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([definition(*parts) for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])


def random_pack(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v in float64, and cu_seqlens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (
        torch.randn(sum(lengths), n, HEAD_DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in sizes
    )
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **_: Any
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, by the definition."""
    assert max_q == cu_q.diff().max()
    assert max_k >= cu_k.diff().max()
    parts = zip(query.split(cu_q.diff().tolist()), *(x.split(cu_k.diff().tolist()) for x in (key, value)), strict=True)
    return torch.cat([definition(*part) for part in parts])


def kernel_of_torch_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert window_size == (-1, 0), "not causal"
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return kernel(query, key, value, cu_q, cu_k, max_q, max_k)


def kernel_before_torch_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return kernel(query, key, value, cu_q, cu_k, max_q, max_k)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: attention.PackLayout) -> Tensor:
    """What `PackedAttention.forward` chooses; k and v already gathered."""
    if attention._has_kernel(q.is_cuda, q.dtype):
        return attention.varlen_attention(q, k, v, layout, SCALE)
    if layout.context is not None:
        return attention._chunked_attention(q, k, v, layout.context, SCALE)
    assert layout.groups is not None
    return attention._padded_attention(q, k, v, layout.groups, SCALE)


@pytest.fixture(params=[None, kernel_of_torch_2_13, kernel_before_torch_2_13], ids=["dense", "varlen", "old varlen"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(attention, "_has_kernel", lambda is_cuda, dtype: True)
        monkeypatch.setattr(attention, "varlen_attn", request.param)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed_attention_equals_attention_one_by_one(lengths: list[int]) -> None:
    q, k, v, cu_seqlens = random_pack(lengths)
    layout = attention.pack_layout(cu_seqlens, max(lengths), dtype=torch.float64)
    check_equal(lambda: attend(q, k, v, layout), (q, k, v), lengths)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_slices_of_a_context_add_up_to_the_whole(lengths: list[int], cp: int, multiple: int) -> None:
    q, k, v, cu_seqlens = random_pack(lengths)
    slices = [slice_context(cu_seqlens, Ranks(cp, rank), multiple=multiple) for rank in range(cp)]  # type: ignore[arg-type]

    def in_slices() -> Tensor:
        keys, values = (torch.cat([context.take(x) for context in slices]) for x in (k, v))
        outputs = []
        for context in slices:
            layout = attention.pack_layout(cu_seqlens, max(lengths), dtype=torch.float64, context=context)
            assert layout.max_seqlen_kv >= max(lengths)
            outputs.append(attend(context.take(q), keys[context.keys], values[context.keys], layout))
        return torch.cat(outputs)[slices[0].gathered]

    check_equal(in_slices, (q, k, v), lengths)
    check_shares(slices, sum(lengths), multiple)


def check_equal(compute: Callable[[], Tensor], inputs: tuple[Tensor, Tensor, Tensor], lengths: list[int]) -> None:
    """Outputs and gradients, to float64's precision."""
    weight = torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).double()
    actual, expected = compute(), one_by_one(*inputs, lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def check_shares(slices: list[ContextSlice], num_tokens: int, multiple: int) -> None:
    """Every position lies on one rank, and the ranks do the same work."""
    (length,) = {len(context.source) for context in slices}
    assert length % multiple == 0
    held = torch.cat([context.source[~context.is_padding] for context in slices])
    assert sorted(held.tolist()) == list(range(num_tokens))
    work = {sum(q * k for q, k in zip(c.query_lengths, c.key_lengths, strict=True)) for c in slices}
    assert len(work) == 1


def test_the_kernels_signature_is_one_of_the_two_known() -> None:
    parameters = inspect.signature(attention.varlen_attn).parameters
    assert "is_causal" in parameters or {"window_size", "enable_gqa"} <= set(parameters)
    assert "scale" in parameters
