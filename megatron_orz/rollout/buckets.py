"""Weights as buckets: tensors of one type, laid end to end in a buffer that is used again.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors of one type, laid end to end."""

    names: list[str]
    shapes: list[list[int]]
    dtype: torch.dtype
    payload: Tensor  # [bytes] uint8

    @property
    def header(self) -> dict[str, Any]:
        """What is needed to read the payload; JSON."""
        return {"names": self.names, "shapes": self.shapes, "dtype": str(self.dtype).removeprefix("torch.")}

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Views of the payload."""
        parts = self.payload.view(self.dtype).split([prod(shape) for shape in self.shapes])
        return [(name, part.view(shape)) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)]


def num_payload_bytes(header: dict[str, Any]) -> int:
    """The size of a bucket's payload."""
    dtype: torch.dtype = getattr(torch, header["dtype"])
    return sum(map(prod, header["shapes"])) * dtype.itemsize


def read_bucket(header: dict[str, Any], payload: Tensor) -> Bucket:
    """The bucket of a header and its payload, [bytes] uint8."""
    return Bucket(
        names=header["names"], shapes=header["shapes"], dtype=getattr(torch, header["dtype"]), payload=payload
    )


def fill_buckets(
    weights: Iterable[tuple[str, Tensor]],
    capacity_bytes: int,
    buffer: Callable[[int], Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """Buckets of up to `capacity_bytes`; a tensor larger than that gets a bucket of its own.

    buffer: called when a bucket begins, gives at least so many bytes, [bytes] uint8.
    dtype: what floating-point tensors are converted to; None leaves them as they are.
    """
    memory = torch.empty(0, dtype=torch.uint8)
    names: list[str] = []
    shapes: list[list[int]] = []
    current, used = torch.uint8, 0
    for name, weight in weights:
        wire = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        size = weight.numel() * wire.itemsize
        if names and (wire != current or used + size > capacity_bytes):
            yield Bucket(names=names, shapes=shapes, dtype=current, payload=memory[:used])
            names, shapes, used = [], [], 0
        if not names:
            memory = buffer(max(size, capacity_bytes))
        memory[used : used + size].view(wire).view(weight.shape).copy_(weight)
        names.append(name)
        shapes.append(list(weight.shape))
        current, used = wire, used + size
    if names:
        yield Bucket(names=names, shapes=shapes, dtype=current, payload=memory[:used])
