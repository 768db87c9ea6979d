"""What lies in a checkpoint of either form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_orz.engine.hf_checkpoint import HFCheckpoint
from megatron_orz.engine.torch_dist import TorchDistCheckpoint, is_torch_dist


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


def list_tensors(path: Path) -> Iterator[TensorInfo]:
    """Every tensor of a checkpoint, by name. Raises ValueError when its files are missing or damaged."""
    if is_torch_dist(path):
        for name, stored in sorted(TorchDistCheckpoint(path).tensors.items()):
            yield _info(name, tuple(stored.size), str(stored.properties.dtype), stored.properties.dtype.itemsize)
    else:
        checkpoint = HFCheckpoint(path)
        for name in sorted(checkpoint.files):
            shape, dtype = checkpoint.shape_and_dtype(name)
            yield _info(name, shape, str(dtype), dtype.itemsize)


def _info(name: str, shape: tuple[int, ...], dtype: str, itemsize: int) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype=dtype.removeprefix("torch."), num_bytes=math.prod(shape) * itemsize)
