"""Distributed checkpoints written chunk by chunk, as `megatron.core.dist_checkpointing.load` reads them.

megatron-core's own `save` wants the whole model in memory and a process group; the format itself wants neither.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization_config

from megatron_orz.conversion.resumable import Advance
from megatron_orz.conversion.safetensors_file import write_all
from megatron_orz.engine.checkpoint_metadata import METADATA_FILE
from megatron_orz.engine.torch_dist import COMMON_FILE, CONTENT, FORMAT, FORMAT_FILE

CHUNK_BYTES = 16 * 2**20
"""Largest chunk of a tensor. Readers hold one at a time, in memory that the C library hands out again and again: what
is larger than 32 MiB it takes from the system anew, which costs more than the copy."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One parameter, as a part of the tensor stored under `key`."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where in the tensor it lies; longer than `shape` by the dimension that counts experts."""
    shape: tuple[int, ...]
    block_rows: tuple[int, ...]
    """The parameter comes in blocks of so many rows."""
    dtype: torch.dtype

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """(block, its rows) of every chunk."""
        step = max(1, CHUNK_BYTES // (math.prod(self.shape[1:]) * self.dtype.itemsize))
        for block, num_rows in enumerate(self.block_rows):
            for row in range(0, num_rows, step):
                yield block, slice(row, min(row + step, num_rows))

    def chunk_offset(self, block: int, rows: slice) -> tuple[int, ...]:
        leading = len(self.offset) - len(self.shape)
        row = self.offset[leading] + sum(self.block_rows[:block]) + rows.start
        return (*self.offset[:leading], row, *self.offset[leading + 1 :])

    def chunk_shape(self, rows: slice) -> tuple[int, ...]:
        leading = (1,) * (len(self.offset) - len(self.shape))
        return (*leading, rows.stop - rows.start, *self.shape[1:])


class _Counted:
    """A stream that knows how far it has come, and what went wrong."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.position = stream, 0
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content)
        try:
            write_all(self._stream, view)
        except OSError as error:
            self.error = error
            raise
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        pass


class TorchDistWriter:
    """Writes parameters into one file; `places` holds offset and length of every chunk, in order."""

    def __init__(self, stream: BinaryIO, advance: Advance) -> None:
        self._stream, self._advance = _Counted(stream), advance
        self._buffer = bytearray()
        self.places: list[list[int]] = []

    def write(self, stored: StoredTensor, blocks: Sequence[Tensor]) -> None:
        """Tensors of another type than `stored` says are converted, a chunk at a time."""
        assert tuple(len(block) for block in blocks) == stored.block_rows
        for block, rows in stored.chunks():
            chunk = self._copy(blocks[block][rows], stored.dtype).view(stored.chunk_shape(rows))
            start = self._stream.position
            try:
                # No reader checks the sum, and it takes longer than the copy.
                with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                    torch.save(chunk, self._stream)  # type: ignore[arg-type]
            except RuntimeError as error:  # what torch makes of a full disk
                raise self._stream.error or error from error
            self.places.append([start, self._stream.position - start])
            self._advance(chunk.nbytes)

    def _copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy whose memory is no larger than itself, because torch.save writes all that lies behind a view.

        It lies in one buffer, which the next copy overwrites: fresh memory costs more than the copy.
        """
        num_bytes = tensor.numel() * dtype.itemsize
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        copy = torch.frombuffer(memoryview(self._buffer)[:num_bytes], dtype=dtype)
        return copy.copy_(tensor.reshape(-1))


def write_metadata(
    directory: Path, files: Mapping[str, Sequence[StoredTensor]], places: Mapping[str, Sequence[Sequence[int]]]
) -> None:
    """Describes the files of a checkpoint. places: of each file, as its `TorchDistWriter` left them."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file, stored_tensors in files.items():
        of_file = iter(places[file])
        for stored in stored_tensors:
            entry = tensors.setdefault(
                stored.key,
                TensorStorageMetadata(
                    properties=TensorProperties(dtype=stored.dtype), size=torch.Size(stored.global_shape), chunks=[]
                ),
            )
            for block, rows in stored.chunks():
                offset = stored.chunk_offset(block, rows)
                index = MetadataIndex(stored.key, offset, len(entry.chunks))
                entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(stored.chunk_shape(rows))))
                start, length = next(of_file)
                storage[index] = _StorageInfo(relative_path=file, offset=start, length=length)
    with open(directory / METADATA_FILE, "wb") as stream:
        pickle.dump(Metadata(state_dict_metadata=dict(tensors), storage_data=storage), stream)
    torch.save({"content_metadata": CONTENT}, directory / COMMON_FILE)
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT) + "\n")
