"""Packs as one rank computes them: on its device, and under context parallelism only its positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megatron_orz.engine.attention import PackLayout, pack_layout
from megatron_orz.engine.context import ContextSlice, slice_context
from megatron_orz.engine.parallel import Mesh
from megatron_orz.types import PackedBatch

Batch = TypeVar("Batch", bound=PackedBatch)


@dataclass(frozen=True, kw_only=True)
class MicroBatch(Generic[Batch]):
    """One pass through the model."""

    batch: Batch
    """The whole pack, T positions."""
    local: Batch
    """This rank's t positions of it; all of them without context parallelism."""
    layout: PackLayout
    """How attention reads it."""
    context: ContextSlice | None

    def take(self, x: Tensor) -> Tensor:
        """[T] -> this rank's [t], zero where it has padding."""
        return x if self.context is None else self.context.take(x)

    def whole(self, x: Tensor) -> Tensor:
        """[t] of every context-parallel rank -> [T] on each of them. Not differentiable."""
        return x if self.context is None else self.context.whole(x)


def with_fillers(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """The batches, and packs without loss tokens after them where the interleaved schedule needs a multiple of pp."""
    num_fillers = -len(batches) % mesh.pp if mesh.config.vpp > 1 else 0
    fillers = [_without_loss(batches[0], mesh.pack_multiple) for _ in range(num_fillers)]
    return [*batches, *fillers]


def micro_batches(batches: Iterable[Batch], mesh: Mesh, *, dtype: torch.dtype) -> Iterator[MicroBatch[Batch]]:
    """Each as it is asked for: the device holds those that are under way. dtype: that of the activations."""
    return (_micro_batch(batch.to(mesh.device), mesh, dtype) for batch in batches)


def _micro_batch(batch: Batch, mesh: Mesh, dtype: torch.dtype) -> MicroBatch[Batch]:
    context = None
    if mesh.cp > 1:
        context = slice_context(batch.cu_seqlens, mesh.cp_group, multiple=mesh.pack_multiple)
    return MicroBatch(
        batch=batch,
        local=batch if context is None else context.cut(batch),
        layout=pack_layout(batch.cu_seqlens, batch.max_seqlen, dtype=dtype, context=context),
        context=context,
    )


def _without_loss(batch: Batch, length: int) -> Batch:
    """The first positions of a pack as one sequence that no loss looks at."""
    cut: dict[str, Any] = {name: x[:length] for name, x in batch.token_arrays().items()}
    cut |= {
        "position_ids": torch.arange(length),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "loss_mask": torch.zeros(length, dtype=torch.bool),
    }
    return replace(batch, max_seqlen=length, **cut)
