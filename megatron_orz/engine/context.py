"""Context parallelism: the positions of a pack that one rank computes.

Every sequence is padded to a multiple of 2 * cp and cut into as many chunks of equal length. Rank r holds chunks r and
2 * cp - 1 - r: an early one, which sees few keys, and a late one, which sees many, so that the ranks share the work of
causal attention evenly. With cp 2 and sequences of 7 and 3 tokens (`.` is padding):

    pack        a0 a1 a2 a3 a4 a5 a6    b0 b1 b2
    rank 0      a0 a1       a6 .        b0      .
    rank 1         a2 a3 a4 a5            b1 b2
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_orz.types import PackedBatch

Batch = TypeVar("Batch", bound=PackedBatch)


@dataclass(frozen=True, kw_only=True)
class ContextSlice:
    """This rank's t positions of a pack of T positions; t is the same on every rank."""

    group: dist.ProcessGroup
    """The context-parallel ranks."""
    source: Tensor
    """[t] int64, the pack position behind each of this rank's; 0 where there is none."""
    is_padding: Tensor
    """[t] bool."""
    gathered: Tensor
    """[T] int64, where each pack position lies once the slices of all ranks are laid end to end."""
    query_lengths: tuple[int, ...]
    """Lengths of this rank's chunks, in their order; they add up to t."""
    key_lengths: tuple[int, ...]
    """How many keys, from the start of its sequence, the last query of each chunk sees."""
    keys: Tensor
    """[sum of key_lengths] int64, where these keys lie in the slices of all ranks laid end to end."""

    def take(self, x: Tensor) -> Tensor:
        """[T, ...] -> this rank's [t, ...], zero (False) at the padding."""
        padding = self.is_padding.view(-1, *[1] * (x.dim() - 1))
        return x.index_select(0, self.source).masked_fill(padding, 0)

    def cut(self, batch: Batch) -> Batch:
        """A pack with this rank's positions; `cu_seqlens` and `max_seqlen` stay those of the whole pack."""
        cut: dict[str, Any] = {name: self.take(x) for name, x in batch.token_arrays().items()}
        return replace(batch, **cut)

    def whole(self, x: Tensor) -> Tensor:
        """[t] of every rank -> [T] on every rank. Not differentiable."""
        parts = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts).index_select(0, self.gathered)


def slice_context(cu_seqlens: Tensor, group: dist.ProcessGroup, *, multiple: int = 1) -> ContextSlice:
    """This rank's positions of a pack. cu_seqlens: [B + 1] int32; t becomes a multiple of `multiple`."""
    cp, rank = group.size(), group.rank()
    boundaries = cu_seqlens.cpu().long()
    lengths, first = boundaries.diff(), boundaries[:-1]
    chunk = -(-lengths // (2 * cp))
    if filler := _even_filler(2 * int(chunk.sum()), multiple):
        lengths, first = (torch.cat([x, x.new_zeros(1)]) for x in (lengths, first))
        chunk = torch.cat([chunk, chunk.new_full((1,), filler // 2)])
    local_length = 2 * int(chunk.sum())

    # Every padded position of every sequence: its sequence, its place there, its chunk and its place in a slice.
    sequence = torch.arange(len(chunk)).repeat_interleave(2 * cp * chunk)
    start = (2 * cp * chunk).cumsum(0) - 2 * cp * chunk
    place = torch.arange(len(sequence)) - start[sequence]
    number = place // chunk[sequence]
    owner = torch.minimum(number, 2 * cp - 1 - number)
    is_late = number >= cp
    offset = (2 * chunk).cumsum(0) - 2 * chunk
    local = offset[sequence] + place % chunk[sequence] + chunk[sequence] * is_late
    gathered = owner * local_length + local

    is_real = place < lengths[sequence]
    is_mine = owner == rank
    source = torch.zeros(local_length, dtype=torch.long)
    source[local[is_mine]] = torch.where(is_real, first[sequence] + place, 0)[is_mine]
    is_padding = torch.ones(local_length, dtype=torch.bool)
    is_padding[local[is_mine]] = ~is_real[is_mine]

    key_lengths = torch.stack([(rank + 1) * chunk, (2 * cp - rank) * chunk], dim=1).flatten()
    keys = [torch.arange(length) + begin for length, begin in zip(key_lengths, start.repeat_interleave(2), strict=True)]
    device = cu_seqlens.device
    return ContextSlice(
        group=group,
        source=source.to(device),
        is_padding=is_padding.to(device),
        gathered=gathered[is_real].to(device),
        query_lengths=tuple(chunk.repeat_interleave(2).tolist()),
        key_lengths=tuple(key_lengths.tolist()),
        keys=gathered[torch.cat(keys)].to(device),
    )


def _even_filler(length: int, multiple: int) -> int:
    """The smallest even number that makes an even length a multiple of `multiple`."""
    filler = -length % multiple
    return filler + multiple if filler % 2 else filler
