"""A model with its optimizer, out to a distributed checkpoint and in again, whatever the layout on either side.

    state = sharded_state(chunks, optimizer)      # names, places and live tensors of this rank's share
    pending = save(state, directory, copy=True)   # collective; from here on training may go on
    pending.write()                               # in any thread: this rank's file, flushed to the disk
    pending.finish(summaries of all ranks)        # on rank 0; the directory is whole

What the optimizer holds has the keys of megatron-core's `fully_reshardable` form, `optimizer.state.exp_avg.<weight>`,
but is not gathered: a rank's part of a flat buffer is a few boxes of each weight, and it writes those. (Its own
`state_dict` without TransformerEngine or apex fails before the first step, and gives all weights one `step` when it
loads.)
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_orz.engine.checkpoint_metadata import read_metadata
from megatron_orz.engine.dist_checkpoint import fill, load_sharded, sharded_states
from megatron_orz.engine.model import HeadlessGPTModel
from megatron_orz.engine.optimizer import Optimizer
from megatron_orz.engine.torch_dist import CONTENT

ShardedState: TypeAlias = dict[str, Any]

COUNTERS = "optimizer_counters"

# megatron-core hands the results of a write from process to process, for which it starts a manager process on every
# rank (some 6 seconds). Here a thread of this process writes. (The name lost its underscore after 0.16.)
for _name in ("_get_write_results_queue", "get_write_results_queue"):
    if hasattr(filesystem_async, _name):
        setattr(filesystem_async, _name, queue.SimpleQueue)
# Whose asynchronous writer is asked for the plan: megatron-core 0.16 has its own alone.
_ASYNC_STRATEGY = (
    {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
)


def sharded_state(chunks: Sequence[HeadlessGPTModel], optimizer: Optimizer | None) -> ShardedState:
    """Weights, moments and counters of this rank, by their place in the whole model. The tensors are the live ones.

    A frozen model, which has no optimizer, is its weights.
    """
    state: ShardedState = sharded_states(chunks)
    if optimizer is None:
        return state
    of_parameter = {id(sharded.data): sharded for sharded in nested_values(state)}
    state["optimizer"] = [
        box
        for share in optimizer.shares()
        for name, tensor in share.tensors.items()
        for box in _boxes(name, tensor, share.start, of_parameter[id(share.parameter)], is_own=share.is_own)
    ]
    state[COUNTERS] = optimizer.counters()
    return state


def _boxes(
    name: str, flat: Tensor, start: int, weight: ShardedTensor | ShardedTensorFactory, *, is_own: bool
) -> Iterator[ShardedTensor]:
    """Elements [start, start + n) of a flattened weight as boxes of the whole weight; each is a view of `flat`, [n].

    is_own: no other data-parallel rank holds these elements.
    """
    pieces = [weight] if isinstance(weight, ShardedTensor) else list(nested_values(weight.build()))
    piece_start = 0
    for piece in pieces:
        piece_end = piece_start + piece.data.numel()
        first, last = max(start, piece_start), min(start + flat.numel(), piece_end)
        leading, rows = piece.prepend_axis_num, piece.local_shape[0]
        row_size = piece.data.numel() // rows
        replica_id = (*piece.replica_id[:2], 0) if is_own else piece.replica_id
        for row, column, shape in _rectangles(first - piece_start, last - piece_start, row_size, piece.local_shape):
            offset = list(piece.global_offset)
            offset[leading] += row
            if len(piece.local_shape) > 1:
                offset[leading + 1] += column
            begin = piece_start + row * row_size + column - start
            shape = (*(1 for _ in range(leading)), *shape)
            data = flat[begin : begin + torch.Size(shape).numel()].view(shape)
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{piece.key}",
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_shape=piece.global_shape,
                global_offset=tuple(offset),
                axis_fragmentations=None,  # boxes of many shapes
                replica_id=replica_id,
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )
        piece_start = piece_end
    assert piece_start == weight.data.numel(), weight.key


def _rectangles(
    first: int, last: int, row_size: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(row, column, shape) of the rectangles that make up elements [first, last) of a matrix or a vector."""
    if len(shape) == 1:
        if first < last:
            yield first, 0, (last - first,)
        return
    assert len(shape) == 2, shape
    while first < last:
        row, column = divmod(first, row_size)
        num_rows = (last - first) // row_size if column == 0 else 0
        if num_rows:
            yield row, 0, (num_rows, row_size)
            first += num_rows * row_size
        else:
            length = min(row_size - column, last - first)
            yield row, column, (1, length)
            first += length


class PendingSave:
    """What one rank has to write of a checkpoint whose content is fixed."""

    def __init__(self, writer: FileSystemWriterAsync, metadata: Metadata | None) -> None:
        self._writer = writer
        self._metadata = metadata
        self.summary: list[Any] = []

    def write(self) -> list[Path]:
        """Writes this rank's share and flushes it to the disk, in any thread; holds none of it afterwards.

        Raises OSError.
        """
        files = []
        for path, storage_key, (objects, tensors) in self._writer.write_buckets:
            done: queue.Queue[int] = queue.Queue()
            done.put(0)
            outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
            # Each tensor comes to the host, where it is not there already, as it is written.
            on_host = path, storage_key, (objects, _OnHost(tensors))
            self._writer.write_preloaded_data([self._writer.transforms], 0, on_host, outcomes, done, use_fsync=True)
            tensors.clear()
            _, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise _of_the_disk(outcome) or outcome
            self.summary += outcome
            files.append(Path(path))
        return files

    def finish(self, summaries: Sequence[list[Any]]) -> None:
        """On rank 0, once every rank has written: the files that describe the others. Raises OSError."""
        self._writer.finish(self._metadata, summaries)
        save_config(CheckpointingConfig("torch_dist", 1), self._writer.checkpoint_dir)


def _of_the_disk(error: BaseException) -> OSError | None:
    """The OSError behind an error: torch's zip writer covers it with one of its own as it closes."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


class _OnHost(list[tuple[Any, Tensor]]):
    """Items whose tensors come to the host one by one, as they are asked for."""

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for item, tensor in super().__iter__():
            yield item, tensor.cpu()


class _Planned(TorchDistSaveShardedStrategy):
    """Plans a save, and leaves writing to whoever takes the plan."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, plan: tuple[Any, ...], *_: Any
    ) -> AsyncRequest:
        self.pending = PendingSave(writer, plan[1])
        return AsyncRequest(None, (), [])


def save(state: ShardedState, directory: Path, *, copy: bool) -> PendingSave:
    """Fixes what is saved. Collective; `directory` is empty, and every rank sees it.

    copy: in host memory of its own, so that training may go on before all is written. Else the live tensors are read.
    """
    strategy = _Planned()
    apply_factories(state)
    if copy:
        for container, key, sharded in list(nested_items_iter(state)):
            if isinstance(sharded, ShardedTensor) and is_main_replica(sharded.replica_id):
                data = torch.empty(sharded.data.shape, dtype=sharded.dtype).copy_(sharded.data.detach())
                container[key] = replace(sharded, data=data)
    dist_checkpointing.save(
        state,
        str(directory),
        sharded_strategy=strategy,
        async_sharded_save=True,
        content_metadata=CONTENT,
        **_ASYNC_STRATEGY,
    )
    return strategy.pending


def load(chunks: Sequence[HeadlessGPTModel], optimizer: Optimizer | None, directory: Path) -> None:
    """Fills weights, moments and counters. Collective; the checkpoint may come from any layout."""
    state = sharded_state(chunks, optimizer)
    read_metadata(directory)  # before megatron-core reads it as a pickle that may hold anything
    loaded = load_sharded(state, directory)  # the boxes of the optimizer are filled in place
    fill(chunks, loaded)
    if optimizer is not None:
        optimizer.restore_counters(loaded[COUNTERS])
