"""Megatron's distributed checkpoints (`torch_dist`) as files: names, shapes and tensors, read without megatron-core.

A directory holds `.metadata` (for each key its global shape and its chunks, and the file, offset and length of each),
`__*.distcp` (the chunks, each as `torch.save` writes it), `common.pt` and `metadata.json` (the format's name). Nothing
in it depends on the layout of the ranks that wrote it. Beside them lie the config and tokenizer of the model.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.checkpoint_metadata import read_metadata
from megatron_orz.engine.weight_table import Entry, Vocabulary
from megatron_orz.json_file import read_json

FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}

CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""How megatron-core names and shapes what the checkpoint holds: one key for each layer, one for all experts of a layer.
Saved with the checkpoint as `content_metadata`, and handed to `sharded_state_dict` by whoever loads it."""

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms of a layer by the names they have in checkpoints, where they belong to the linear layer that follows."""


def is_torch_dist(path: Path) -> bool:
    return (path / FORMAT_FILE).is_file()


def checkpoint_key(entry: Entry, architecture: Architecture) -> str:
    """The key of a parameter; all experts of a layer share one, whose tensor has the experts as its first dimension."""
    name = entry.megatron_name
    if entry.expert is not None:
        return name.replace(f".local_experts.{entry.expert}.", ".experts.")
    experts = architecture.experts
    is_sparse = experts is not None and entry.layer is not None and entry.layer not in experts.dense_layers
    for norm, fused in FUSED_NORMS.items():
        if name.endswith(f".{norm}") and not (is_sparse and norm == "pre_mlp_layernorm.weight"):
            return name.removesuffix(norm) + fused
    return name


class TorchDistCheckpoint:
    """The model weights of a distributed checkpoint; what an optimizer left there is passed over."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when a file is missing, damaged or truncated."""
        self.path = path
        _check_format(path / FORMAT_FILE)
        metadata = read_metadata(path)
        self.tensors: Mapping[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._storage: Mapping[tuple[str, Sequence[int]], _StorageInfo] = {
            (index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()
        }
        self.files = sorted({info.relative_path for info in self._storage.values()})
        self._check_storage()

    @property
    def has_value_head(self) -> bool:
        head = self.tensors.get("output_layer.weight")
        return head is not None and head.size[0] == 1

    def check_names(self, table: Sequence[Entry], architecture: Architecture) -> None:
        """Raises ValueError unless the checkpoint holds exactly the parameters of `table`, in their shapes."""
        expected = set()
        for entry in table:
            if entry.is_tied:
                continue
            key = self._key(entry, architecture)
            expected.add(key)
            self._check_shape(key, entry, architecture)
        if unknown := sorted(self.tensors.keys() - expected):
            raise ValueError(
                f"{self.path} holds {len(unknown)} tensors its config.json does not account for, e.g. {unknown[0]}; "
                "check that both are of the same model"
            )

    def dtype(self, entry: Entry, architecture: Architecture) -> torch.dtype:
        return self.tensors[self._key(entry, architecture)].properties.dtype

    def read(self, entry: Entry, architecture: Architecture) -> Iterator[Iterator[Tensor]]:
        """Each Hugging Face tensor of a parameter, in pieces of its rows; no piece is larger than a stored chunk is,
        unless several chunks lie side by side in its rows, or the parameter has to be taken apart."""
        if entry.layout.is_stack:
            starts = itertools.accumulate((shape[0] for shape in entry.hf.values()), initial=0)
            for start, end in itertools.pairwise(starts):
                yield self._read_rows(entry, architecture, start, end)
        else:
            whole = torch.cat(list(self._read_rows(entry, architecture, 0, entry.shape[0])))
            yield from (iter([part]) for part in entry.layout.split(whole))

    def _read_rows(self, entry: Entry, architecture: Architecture, start: int, end: int) -> Iterator[Tensor]:
        key, columns = self._key(entry, architecture), entry.shape[1:]
        # An expert is one row of the first dimension.
        leading = () if entry.expert is None else (entry.expert,)
        offsets = (*leading, start, *(0 for _ in columns))
        sizes = (*(1 for _ in leading), end - start, *columns)
        axis = len(leading)
        found = [
            (tuple(chunk.offsets), overlap)
            for chunk in self.tensors[key].chunks
            if (overlap := _overlap(offsets, sizes, chunk.offsets, chunk.sizes))
        ]
        found.sort(key=lambda chunk: [part.start for part in chunk[1][0]])
        num_found = sum(math.prod(part.stop - part.start for part in region) for _, (region, _) in found)
        if num_found != math.prod(sizes):
            raise ValueError(f"{self.path} holds {key} in part only; save or copy the checkpoint again")
        spans_columns = all(
            part.stop - part.start == size
            for _, (region, _) in found
            for part, size in zip(region[axis + 1 :], columns, strict=True)
        )
        if spans_columns:
            for chunk_offsets, (_, in_chunk) in found:
                yield self._read_chunk(key, chunk_offsets)[in_chunk].view(-1, *columns)
            return
        whole = torch.empty(sizes, dtype=self.tensors[key].properties.dtype)
        for chunk_offsets, (region, in_chunk) in found:
            whole[region] = self._read_chunk(key, chunk_offsets)[in_chunk]
        yield whole.view(-1, *columns)

    def _key(self, entry: Entry, architecture: Architecture) -> str:
        """Raises ValueError when there is none. Norms may go by either of their names."""
        for key in (checkpoint_key(entry, architecture), entry.megatron_name):
            if key in self.tensors:
                return key
        raise ValueError(
            f"{self.path} holds no tensor {checkpoint_key(entry, architecture)}; its config.json asks for it"
        )

    def _check_shape(self, key: str, entry: Entry, architecture: Architecture) -> None:
        found, expected = tuple(self.tensors[key].size), entry.shape
        if entry.expert is not None:
            assert architecture.experts is not None
            expected = (architecture.experts.num_experts, *expected)
        padded = isinstance(entry.layout, Vocabulary) and found[0] >= expected[0] and found[1:] == expected[1:]
        if found != expected and not padded:
            raise ValueError(
                f"{self.path}: {key} has shape {list(found)}, config.json asks for {list(expected)}; "
                "give it the config.json it was saved with"
            )

    def _read_chunk(self, key: str, offsets: tuple[int, ...]) -> Tensor:
        info = self._storage[key, offsets]
        file = self.path / info.relative_path
        try:
            with open(file, "rb", buffering=0) as stream:
                stream.seek(info.offset)
                part: Any = _Slice(stream, info.length)
                tensor: Tensor = torch.load(part, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged content fails in any way, with advice that does not fit
            raise ValueError(
                f"{file} cannot be read at {key} ({type(error).__name__}); copy the checkpoint again"
            ) from error
        return tensor

    def _check_storage(self) -> None:
        """Every chunk has a place, and every file is there as far as its chunks reach."""
        for key, stored in self.tensors.items():
            for chunk in stored.chunks:
                if (key, tuple(chunk.offsets)) not in self._storage:
                    raise ValueError(
                        f"{self.path} does not say where {key} lies at {list(chunk.offsets)}; copy the checkpoint again"
                    )
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{file} is missing; copy the checkpoint again")
            if (size := file.stat().st_size) < end:
                raise ValueError(f"{file} is truncated: {size} of {end} bytes; copy the checkpoint again")


class _Slice(io.RawIOBase):
    """A part of a file from where it stands, as a file of its own."""

    def __init__(self, stream: io.FileIO, length: int) -> None:
        self._stream, self._start, self._length = stream, stream.tell(), length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        self._stream.seek(self._start + base + offset)
        return self.tell()

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._length - self.tell())
        with memoryview(buffer) as view:
            return self._stream.readinto(view[:left])


def _overlap(
    offsets: Sequence[int], sizes: Sequence[int], chunk_offsets: Sequence[int], chunk_sizes: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a region and a chunk meet, as slices of the region and of the chunk; None where they do not."""
    in_region, in_chunk = [], []
    for offset, size, chunk_offset, chunk_size in zip(offsets, sizes, chunk_offsets, chunk_sizes, strict=True):
        start, end = max(offset, chunk_offset), min(offset + size, chunk_offset + chunk_size)
        if start >= end:
            return None
        in_region.append(slice(start - offset, end - offset))
        in_chunk.append(slice(start - chunk_offset, end - chunk_offset))
    return tuple(in_region), tuple(in_chunk)


def _check_format(file: Path) -> None:
    try:
        backend = read_json(file)["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a distributed checkpoint ({error!r}); copy it again") from error
    if backend != FORMAT["sharded_backend"]:
        raise ValueError(f"{file}: sharded_backend {backend!r} is not supported, only 'torch_dist'; save it so")
