"""Packed causal attention for megatron-core.

A pack is handed to megatron-core as one long sequence (`sbhd` with a batch of one) without rotary angles, so that its
own code never loops over sequences: queries and keys are turned here, by angles that are already gathered by position.
This module alone knows where sequences begin and end.

    on                  one rank a sequence                     context parallel (keys and values are gathered)
    CUDA, 16 bit        variable-length flash attention         the same, a chunk of a sequence against its keys
    elsewhere           dense calls on padded groups            a dense call for each chunk
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megatron_orz.engine.context import ContextSlice
from megatron_orz.ops.rotary import rotate

PADDING_SHARE = 0.15
"""Most of a group's positions that may be padding before another group is opened."""


@dataclass(frozen=True)
class PaddedGroups:
    """The sequences of a pack in groups of similar length, each group padded to its longest sequence.

    All groups lie one after the other in one padded array of N positions.
    """

    shapes: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each group."""
    source: Tensor
    """[N] the pack position behind each padded position; 0 where there is none."""
    destination: Tensor
    """[T] the padded position of each pack position."""


@dataclass
class PackLayout(PackedSeqParams):
    """Where the sequences of a pack lie, computed once a pack and used by every layer.

    groups: None where a variable-length kernel reads `cu_seqlens_q` itself, and under context parallelism.
    context: None without context parallelism; with it, queries are chunks of sequences.
    rotation: cosines and sines of the rotary angles of each position, [T, d/2]; the model says what they are.
    """

    groups: PaddedGroups | None = None
    context: ContextSlice | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def pack_layout(
    cu_seqlens: Tensor, max_seqlen: int, *, dtype: torch.dtype, context: ContextSlice | None = None
) -> PackLayout:
    """Describes a pack to the attention below. cu_seqlens: [B + 1] int32; dtype: that of the activations."""
    if context is not None:
        query_boundaries, key_boundaries = (
            torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=cu_seqlens.device)
            for sizes in (context.query_lengths, context.key_lengths)
        )
        return PackLayout(
            qkv_format="sbhd",
            cu_seqlens_q=query_boundaries,
            cu_seqlens_kv=key_boundaries,
            max_seqlen_q=max(context.query_lengths),
            # megatron-core makes rotary angles for as many positions.
            max_seqlen_kv=max(max_seqlen, *context.key_lengths),
            context=context,
        )
    has_kernel = _has_kernel(cu_seqlens.is_cuda, dtype)
    return PackLayout(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        groups=None if has_kernel else _group_by_length(cu_seqlens),
    )


def _has_kernel(is_cuda: bool, dtype: torch.dtype) -> bool:
    return is_cuda and dtype in (torch.bfloat16, torch.float16)


def _group_by_length(cu_seqlens: Tensor) -> PaddedGroups:
    boundaries = cu_seqlens.cpu().long()
    starts, lengths = boundaries[:-1], boundaries.diff()
    order = lengths.argsort(descending=True)
    cuts = _cut_where_padding_grows(lengths[order].tolist())
    shapes, source, inside = [], [], []
    for first, last in itertools.pairwise(cuts):
        members = order[first:last]
        position = torch.arange(int(lengths[members[0]]))
        is_inside = position < lengths[members, None]
        shapes.append((last - first, int(lengths[members[0]])))
        source.append(torch.where(is_inside, starts[members, None] + position, 0).flatten())
        inside.append(is_inside.flatten())
    padded_source, is_inside = torch.cat(source), torch.cat(inside)
    destination = torch.empty(int(boundaries[-1]), dtype=torch.long)
    destination[padded_source[is_inside]] = is_inside.nonzero().squeeze(1)
    device = cu_seqlens.device
    return PaddedGroups(shapes=tuple(shapes), source=padded_source.to(device), destination=destination.to(device))


def _cut_where_padding_grows(descending_lengths: list[int]) -> list[int]:
    """Indices at which groups begin, and the end: a group closes before its padding exceeds PADDING_SHARE."""
    cuts, used = [0], 0
    for index, length in enumerate(descending_lengths):
        longest, num_members = descending_lengths[cuts[-1]], index - cuts[-1] + 1
        if used + length < (1 - PADDING_SHARE) * longest * num_members:
            cuts.append(index)
            used = 0
        used += length
    return [*cuts, len(descending_lengths)]


class _Rearrange(torch.autograd.Function):
    """y[i] = x[index[i]], where `inverse` leads back: x[j] = y[inverse[j]].

    Rows that `inverse` does not name are padding; their gradient is zero by causality, so the backward pass is a
    gather too, never a scatter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class PackedAttention(MegatronModule):
    """`core_attention` of a layer: causal within each sequence of a `PackLayout`, grouped-query, no dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal), attn_mask_type
        assert config.attention_dropout == 0.0
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackLayout | None = None,
    ) -> Tensor:
        """query: [T, 1, heads, d]; key, value: [T, 1, kv_heads, d]. Returns [T, 1, heads * d]."""
        assert packed_seq_params is not None
        assert attention_mask is None
        assert attention_bias is None
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        layout = packed_seq_params
        if layout.rotation is not None:
            q, k = rotate(q, *layout.rotation), rotate(k, *layout.rotation)
        if layout.context is not None:
            k, v = _visible_keys(k, v, layout.context)
        if _has_kernel(q.is_cuda, q.dtype):
            out = varlen_attention(q, k, v, layout, self.scale)
        elif layout.context is not None:
            out = _chunked_attention(q, k, v, layout.context, self.scale)
        else:
            assert layout.groups is not None
            out = _padded_attention(q, k, v, layout.groups, self.scale)
        return out.reshape(out.shape[0], 1, -1)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, groups: PaddedGroups, scale: float) -> Tensor:
    """One dense causal call for each group. Padding follows its sequence, where causality keeps it out of sight."""
    sizes = [num_sequences * length for num_sequences, length in groups.shapes]
    padded = [_Rearrange.apply(x, groups.source, groups.destination).split(sizes) for x in (q, k, v)]
    outputs = []
    for shape, *group in zip(groups.shapes, *padded, strict=True):
        queries, keys, values = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in group)
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, groups.destination)


def _visible_keys(k: Tensor, v: Tensor, context: ContextSlice) -> tuple[Tensor, Tensor]:
    """[t, kv_heads, d] of every rank -> for each of this rank's chunks in turn, the keys and values it sees."""
    gathered = gather_from_sequence_parallel_region(torch.stack([k, v], dim=1), group=context.group)
    k, v = gathered.index_select(0, context.keys).unbind(1)
    return k, v


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor, context: ContextSlice, scale: float) -> Tensor:
    """One dense call for each chunk; its last query sees all of its keys."""
    split_keys = (x.split(context.key_lengths) for x in (k, v))
    outputs = []
    for chunk in zip(q.split(context.query_lengths), *split_keys, strict=True):
        queries, keys, values = (x.transpose(0, 1)[None] for x in chunk)
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        is_visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=is_visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """FlashAttention over the sequences of a layout. q: [T, heads, d]; k, v: [T, kv_heads, d]. Returns [T, heads, d].

    On CUDA, in 16 bits.
    """
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in inspect.signature(varlen_attn).parameters:
        options |= {"window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    else:  # torch before 2.13
        options |= {"is_causal": True}
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_seqlens_q,
        layout.cu_seqlens_kv,
        layout.max_seqlen_q,
        layout.max_seqlen_kv,
        # Where there are fewer queries than keys, the kernel aligns them at the end: the last query sees every key.
        **options,
    )
    return out
