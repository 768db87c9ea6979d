"""Packed weights of vLLM's CPU kernels are read back bit by bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm import _custom_ops as ops
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from megatron_orz.rollout.digests import digest, total
from megatron_orz.rollout.vllm_repack import _unpacked, held_columns

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops._C, "prepack_moe_weight"), reason="the kernels of vLLM's CPU build"
)
DTYPES = [torch.float32, torch.bfloat16]


def awkward(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary weights, and the smallest and largest numbers there are."""
    values = torch.randn(shape)
    values.view(-1)[:4] = torch.tensor([1e-45, -1e-40, 3e38, -3e38])
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 96), (2, 1056, 64)])
def test_experts_are_unpacked(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The last shape has more than 2^16 elements an expert: positions of three bytes."""
    weight = awkward(*shape, dtype=dtype)
    packed = ops.cpu_prepack_moe_weight(weight, "vec")
    assert not torch.equal(packed, weight), "nothing was packed"
    assert torch.equal(_unpacked(packed, "vec"), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (96, 600), (17, 300)])
def test_linear_layers_are_read_back(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = awkward(rows, columns, dtype=dtype)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0
    held = list(held_columns(layer, "weight", columns))
    assert [first for first, _ in held] == list(range(0, columns, 256))
    # The bfloat16 kernel takes subnormal numbers for zeros, as a digest does.
    is_normal = weight.abs() >= torch.finfo(dtype).tiny
    assert torch.equal(torch.cat([some for _, some in held], dim=1) * is_normal, weight * is_normal)
    assert total([digest(some, column=first) for first, some in held]) == digest(weight)


def test_other_parameters_are_read_as_they_are() -> None:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(4, 6, 8), requires_grad=False)
    ((first, held),) = held_columns(layer, "weight", 8)
    assert first == 0
    assert torch.equal(held, layer.weight.view(24, 8))
