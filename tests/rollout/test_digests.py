from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from megatron_orz.rollout.digests import Block, as_matrix, digest, total

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def weight(position: int) -> int:
    """The definition, in whole numbers."""
    x = position + 1
    for multiplier in (-0x61C8864680B583EB, -0x4B47D0C5A1B2E3D3):
        x = signed(x * multiplier, 64)
        x = signed(x ^ (x >> 31), 64)
    return x | 1


def signed(value: int, bits: int) -> int:
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def definition(matrix: Tensor) -> int:
    result = 0
    for r, row in enumerate(matrix.tolist()):
        inner = 0
        for c, value in enumerate(row):
            (bits,) = struct.unpack("<i", struct.pack("<f", value if abs(value) >= 2.0**-126 else 0.0))
            inner += signed((bits ^ (bits >> 16)) * weight(c), 32)
        result += weight(r) * inner
    return result % 2**64


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (1, 300), (300, 1), (0, 3)])
def test_digest_equals_its_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert digest(matrix) == definition(matrix)


def test_large_matrices_are_the_sum_of_their_chunks() -> None:
    """Longer than the chunks that a digest is computed in."""
    matrix = torch.randn(1000, 600)
    halves = [digest(matrix[:333]), digest(matrix[333:], row=333)]
    assert digest(matrix) == total(halves)


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_add_up_to_the_whole(dtype: torch.dtype) -> None:
    matrix = torch.randn(64, 48).to(dtype)
    rows, columns = ((0, 1), (1, 40), (40, 64)), ((0, 17), (17, 48))
    parts = [digest(matrix[a:b, c:d], row=a, column=c) for a, b in rows for c, d in columns]
    assert total(parts) == digest(matrix)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    matrix = torch.randn(4, 5).to(dtype)
    before = digest(matrix)
    for index in range(matrix.nbytes):
        for bit in range(8):
            changed = matrix.clone()
            changed.view(torch.uint8).view(-1)[index] ^= 1 << bit
            assert digest(changed) != before


def test_moved_values_are_seen() -> None:
    matrix = torch.randn(8, 8)
    moved = [matrix.t(), matrix.roll(1, 0), matrix.roll(1, 1), matrix.flip(0), matrix.flip(1), matrix.view(4, 16)]
    assert len({digest(other) for other in [matrix, *moved]}) == 7


def test_zeros_and_subnormal_numbers_are_equal() -> None:
    matrix = torch.randn(3, 3)
    values = [0.0, -0.0, 1e-39, -1e-45, 2.0**-126, -(2.0**-126)]
    digests = []
    for value in values:
        matrix[1, 1] = value
        digests.append(digest(matrix))
    assert len(set(digests[:4])) == 1
    assert len(set(digests[3:])) == 3


def test_blocks_of_views() -> None:
    whole = torch.zeros(6, 10)
    assert Block.of(whole, num_columns=10) == Block(0, 0, 6, 10)
    assert Block.of(whole[2:5, 3:7], num_columns=10) == Block(2, 3, 3, 4)
    assert Block.of(whole[4], num_columns=10) == Block(4, 0, 1, 10)
    assert Block.of(whole[:, 3:4], num_columns=10) == Block(0, 3, 6, 1)
    assert Block.of(whole.t(), num_columns=10) is None
    assert Block.of(whole[::2], num_columns=10) is None
    assert Block.of(whole[:, ::2], num_columns=10) is None
    assert Block.of(torch.zeros(7)[2:5], num_columns=7) == Block(0, 2, 1, 3)
    assert Block.of(torch.zeros(()), num_columns=1) == Block(0, 0, 1, 1)
    experts = torch.zeros(4, 6, 10)
    assert Block.of(experts[3, 2:4], num_columns=10) == Block(20, 0, 2, 10)
    assert Block.of(experts[1:3], num_columns=10) == Block(6, 0, 12, 10)
    assert Block.of(experts[1:3, 2:4], num_columns=10) is None


def test_matrices_of_tensors() -> None:
    assert [tuple(as_matrix(torch.zeros(shape)).shape) for shape in [(), (5,), (2, 3), (2, 3, 4)]] == [
        (1, 1),
        (1, 5),
        (2, 3),
        (6, 4),
    ]
