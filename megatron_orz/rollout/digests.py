"""A digest of a tensor that can be summed over parts: of a tensor that servers hold in pieces, fused with others.

    D(x) = sum_r h(r) sum_c g(c) bits(x[r, c])     mod 2^64, the inner products mod 2^32

bits: the bit pattern of the element as float32, b ^ (b >> 16), where -0 and subnormal numbers, which kernels may flush,
count as +0; g, h: odd pseudo-random weights of column and row. An odd weight has an inverse, so a change of a single
element changes the digest for certain; any other change goes unnoticed with a probability of about 2^-32. It guards
against accidents, not against forgery.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

_CHUNK_BYTES = 256 * 2**10  # intermediate results stay in the cache
_MODULUS = 2**64
_LARGEST_SUBNORMAL = 2.0**-126 - 2.0**-149  # of float32


class Block(NamedTuple):
    """A rectangle of a matrix. A tensor [..., C] is the matrix [R, C]; one without dimensions is [1, 1]."""

    row: int
    column: int
    num_rows: int
    num_columns: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.num_rows * self.num_columns

    @classmethod
    def of(cls, view: Tensor, *, num_columns: int) -> Block | None:
        """The block that a view covers of a contiguous tensor [..., num_columns]; None if it covers no block."""
        row, column = divmod(int(view.storage_offset()), num_columns)
        width = view.shape[-1] if view.dim() else 1
        expected = 1  # the strides of a block: rows lie num_columns apart, and further dimensions are rows of rows
        for dim in reversed(range(view.dim())):
            if view.shape[dim] > 1 and view.stride(dim) != expected:
                return None
            expected = num_columns if dim == view.dim() - 1 else expected * view.shape[dim]
        block = cls(row, column, view.numel() // width if width else 0, width)
        return block if block.column + width <= num_columns else None


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., C] -> [R, C]."""
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def digest(matrix: Tensor, *, row: int = 0, column: int = 0) -> int:
    """The digest of a block: [n, m] floating point, whose first element is [row, column] of the whole tensor.

    Types that float32 does not hold exactly are not supported.
    """
    num_rows, num_columns = matrix.shape
    column_weights = _weights(column, num_columns, matrix.device).to(torch.int32)
    row_weights = _weights(row, num_rows, matrix.device)
    rows_per_chunk = max(1, _CHUNK_BYTES // (4 * max(1, num_columns)))
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    for chunk, weights in zip(matrix.split(rows_per_chunk), row_weights.split(rows_per_chunk), strict=True):
        bits = hardshrink(chunk.float(), _LARGEST_SUBNORMAL).contiguous().view(torch.int32)
        bits ^= bits >> 16  # of half-precision types, the lower half alone would be zeros
        bits *= column_weights
        total += (bits.sum(-1, dtype=torch.int64) * weights).sum()
    return int(total) % _MODULUS


def total(digests: list[int]) -> int:
    """The digest of a whole of which these are the digests of disjoint blocks."""
    return sum(digests) % _MODULUS


def _weights(first: int, count: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers of the positions from `first` on, [count] int64, equal on every device."""
    x = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    for multiplier in (-0x61C8864680B583EB, -0x4B47D0C5A1B2E3D3):  # odd, like the constants of splitmix64
        x = x * multiplier
        x ^= x >> 31
    return x | 1
