"""The `.metadata` file of a distributed checkpoint, read as data: it is a pickle, and a pickle may name any function.

Only what describes tensors and where they lie is let in. megatron-core and torch read the same file as an ordinary
pickle, so whoever hands them a checkpoint reads its metadata here first.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

METADATA_FILE = ".metadata"

_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_INTEGER_TYPES = ("int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED = {
    "torch": {"Size", "device", *_DTYPES, *_INTEGER_TYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "BytesStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}


class _Unpickler(pickle._Unpickler):
    """The one in Python: that in C takes memory for every memo index that a damaged file names, gigabytes at a time."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The metadata of the checkpoint in the directory `path`.

    Raises ValueError when it is missing or damaged, or names anything but descriptions of tensors, or a file outside of
    the directory.
    """
    file = path / METADATA_FILE
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        _check(metadata)
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}); "
            "copy the checkpoint again, from a source you trust"
        ) from error
    return metadata


def _check(metadata: Any) -> None:
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds a {type(metadata).__name__}")
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is no name")
        if isinstance(stored, TensorStorageMetadata):
            shapes = [stored.size, *(shape for chunk in stored.chunks for shape in (chunk.offsets, chunk.sizes))]
            if not all(type(size) is int and size >= 0 for shape in shapes for size in shape):
                raise ValueError(f"{key} has a shape that no tensor has")
            stored.properties.dtype.itemsize  # noqa: B018  # raises where there is no type
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise TypeError(f"{index!r}: {info!r} is no place of a tensor")
        name = PurePosixPath(info.relative_path)
        if name.is_absolute() or ".." in name.parts or "\0" in info.relative_path:
            raise ValueError(f"{info.relative_path!r} is not a file of the checkpoint")
        if not (type(info.offset) is int and type(info.length) is int and info.offset >= 0 and info.length >= 0):
            raise ValueError(f"{index.fqn} lies nowhere")
        hash((index.fqn, tuple(index.offset or ())))
