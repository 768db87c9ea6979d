"""Safetensors files written tensor by tensor: the format is a header of names, types and places, then the bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_orz.conversion.resumable import Advance
from megatron_orz.engine.dtypes import SAFETENSORS_DTYPES

TYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
BUFFER_BYTES = 16 * 2**20


class SafetensorsWriter:
    """Writes the tensors named in `layout`, which have to come in its order.

    layout: name -> (shape, type). Tensors of another type are converted, a buffer at a time.
    """

    def __init__(
        self, stream: BinaryIO, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], advance: Advance
    ) -> None:
        self._stream, self._advance = stream, advance
        self._pending = list(layout.items())
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (shape, dtype) in layout.items():
            end = start + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write_all(stream, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """pieces: the rows of the tensor, in runs."""
        expected, (shape, dtype) = self._pending.pop(0)
        assert name == expected
        num_elements = 0
        for piece in pieces:
            assert tuple(piece.shape[1:]) == shape[1:]
            num_elements += piece.numel()
            for part in piece.reshape(-1).split(BUFFER_BYTES // dtype.itemsize):
                content = part.to(dtype).view(torch.uint8).numpy()
                write_all(self._stream, memoryview(content))
                self._advance(content.nbytes)
        assert num_elements == math.prod(shape)


def write_all(stream: BinaryIO, content: memoryview) -> None:
    """An unbuffered stream may take less than it is given."""
    while content:
        content = content[stream.write(content) :]
