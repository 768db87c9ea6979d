"""Hugging Face checkpoint -> distributed checkpoint -> Hugging Face checkpoint, a tensor at a time.

Everything that can be wrong with the input is found while planning: the names, shapes and types of all tensors are
checked, and the sizes of all files, before a byte is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_orz.checkpoint.hf_export import (
    MAX_SHARD_BYTES,
    copy_companions,
    shard_names,
    write_config,
    write_index,
)
from megatron_orz.conversion.resumable import Advance, OutputFile, write_directory
from megatron_orz.conversion.safetensors_file import TYPE_NAMES, SafetensorsWriter
from megatron_orz.conversion.torch_dist_file import StoredTensor, TorchDistWriter, write_metadata
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.checkpoint_metadata import METADATA_FILE
from megatron_orz.engine.hf_checkpoint import HFCheckpoint
from megatron_orz.engine.torch_dist import TorchDistCheckpoint, checkpoint_key
from megatron_orz.engine.weight_table import Entry, weight_table

TORCH_DIST_FILE_BYTES = 2 * 10**9
"""About how large a file of a distributed checkpoint grows; what is resumed is whole files."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that has been checked and can be run."""

    target: Path
    files: Sequence[OutputFile]
    identity: Mapping[str, Any]
    finish: Callable[[Path, Mapping[str, Any]], None]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def run(self, advance: Advance) -> bool:
        """Returns False when the target is complete already. Raises as `write_directory` does."""
        return write_directory(self.target, self.files, identity=self.identity, finish=self.finish, advance=advance)


def plan_hf_to_megatron(source: Path, target: Path, *, dtype: torch.dtype | None = None) -> Conversion:
    """A policy, or a critic where the checkpoint holds `score.weight`. dtype: None keeps every tensor's own.

    Raises ValueError when the source is not a complete checkpoint of a supported model.
    """
    architecture = read_architecture(source)
    checkpoint = HFCheckpoint(source)
    checkpoint.check_names(architecture, value_head=checkpoint.has_value_head)
    table = [entry for entry in weight_table(architecture, value_head=checkpoint.has_value_head) if not entry.is_tied]
    stored = {entry.megatron_name: _stored(entry, architecture, dtype or checkpoint.dtype(entry.hf)) for entry in table}

    def num_bytes(entry: Entry) -> int:
        return math.prod(entry.shape) * stored[entry.megatron_name].dtype.itemsize

    def writer(entries: Sequence[Entry]) -> Callable[[BinaryIO, Advance], Any]:
        def write(stream: BinaryIO, advance: Advance) -> list[list[int]]:
            file = TorchDistWriter(stream, advance)
            for entry in entries:
                parts = [checkpoint.read(name, shape) for name, shape in entry.hf.items()]
                file.write(stored[entry.megatron_name], parts if entry.layout.is_stack else [entry.layout.join(parts)])
            return file.places

        return write

    groups = {
        f"__0_{number}.distcp": entries
        for number, entries in enumerate(_group(table, num_bytes, TORCH_DIST_FILE_BYTES))
    }

    def finish(directory: Path, places: Mapping[str, Any]) -> None:
        copy_companions(source, directory)
        if dtype:
            write_config(directory / "config.json", dtype, value_head=checkpoint.has_value_head)
        tensors = {file: [stored[entry.megatron_name] for entry in entries] for file, entries in groups.items()}
        write_metadata(directory, tensors, places)

    return Conversion(
        target=target,
        files=[
            OutputFile(name=name, num_bytes=sum(map(num_bytes, entries)), write=writer(entries))
            for name, entries in groups.items()
        ],
        identity=_identity("megatron", {*checkpoint.files.values(), source / "config.json"}, dtype),
        finish=finish,
    )


def plan_megatron_to_hf(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, companions: Path | None = None
) -> Conversion:
    """A policy, or a critic where the output layer has one row.

    companions: where config.json and the tokenizer lie; None for beside the checkpoint.
    Raises ValueError when the source is not a complete checkpoint of a supported model.
    """
    companions = companions or source
    architecture = read_architecture(companions)
    checkpoint = TorchDistCheckpoint(source)
    value_head = checkpoint.has_value_head
    table = [entry for entry in weight_table(architecture, value_head=value_head) if not entry.is_tied]
    checkpoint.check_names(table, architecture)
    dtypes = {entry.megatron_name: dtype or checkpoint.dtype(entry, architecture) for entry in table}
    for name, kind in dtypes.items():
        if kind not in TYPE_NAMES:
            raise ValueError(f"{source}: {name} is stored as {kind}; name a --dtype to convert it to")
    layouts = {entry.megatron_name: _hf_layout(entry, dtypes[entry.megatron_name]) for entry in table}

    def num_bytes(entry: Entry) -> int:
        return sum(math.prod(shape) * kind.itemsize for shape, kind in layouts[entry.megatron_name].values())

    def writer(entries: Sequence[Entry]) -> Callable[[BinaryIO, Advance], Any]:
        def write(stream: BinaryIO, advance: Advance) -> None:
            layout = {name: place for entry in entries for name, place in layouts[entry.megatron_name].items()}
            file = SafetensorsWriter(stream, layout, advance)
            for entry in entries:
                for name, pieces in zip(entry.hf, checkpoint.read(entry, architecture), strict=True):
                    file.write(name, pieces)
                if "score.weight" in entry.hf:
                    file.write("score.bias", [torch.zeros(1)])

        return write

    groups = list(_group(table, num_bytes, MAX_SHARD_BYTES))
    shards = dict(zip(shard_names(len(groups)), groups, strict=True))
    files = [
        OutputFile(name=name, num_bytes=sum(map(num_bytes, entries)), write=writer(entries))
        for name, entries in shards.items()
    ]

    read = (source / name for name in (*checkpoint.files, METADATA_FILE))

    def finish(directory: Path, _: Mapping[str, Any]) -> None:
        copy_companions(companions, directory)
        write_config(directory / "config.json", dtypes[table[0].megatron_name], value_head=value_head)
        tensors = {
            name: [tensor for entry in entries for tensor in layouts[entry.megatron_name]]
            for name, entries in shards.items()
        }
        write_index(directory, tensors, num_bytes=sum(file.num_bytes for file in files))

    return Conversion(
        target=target,
        files=files,
        identity=_identity("hf", {*read, companions / "config.json"}, dtype),
        finish=finish,
    )


def _stored(entry: Entry, architecture: Architecture, dtype: torch.dtype) -> StoredTensor:
    key, shape = checkpoint_key(entry, architecture), entry.shape
    block_rows = tuple(shape[0] for shape in entry.hf.values()) if entry.layout.is_stack else (shape[0],)
    if entry.expert is None:
        global_shape: tuple[int, ...] = shape
        offset: tuple[int, ...] = (0,) * len(shape)
    else:
        assert architecture.experts is not None
        global_shape = (architecture.experts.num_experts, *shape)
        offset = (entry.expert, *(0 for _ in shape))
    return StoredTensor(
        key=key, global_shape=global_shape, offset=offset, shape=shape, block_rows=block_rows, dtype=dtype
    )


def _hf_layout(entry: Entry, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    layout = {name: (shape, dtype) for name, shape in entry.hf.items()}
    if "score.weight" in layout:
        layout["score.bias"] = ((1,), dtype)
    return layout


def _group(entries: Iterable[Entry], num_bytes: Callable[[Entry], int], limit: int) -> Iterable[list[Entry]]:
    """Runs of entries that stay within `limit` bytes, or of a single one that does not."""
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + num_bytes(entry) > limit:
            yield group
            group, size = [], 0
        group.append(entry)
        size += num_bytes(entry)
    yield group


def _identity(kind: str, read: Iterable[Path], dtype: torch.dtype | None) -> dict[str, Any]:
    """What is written, from which files as they are."""
    stats = {file.name: file.stat() for file in sorted(read)}
    return {
        "form": kind,
        "dtype": str(dtype),
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
