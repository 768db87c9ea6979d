"""The ops of a layer, kernel and reference, with their gradients, against their formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_orz.ops import extension, reference, rms_norm, rotary, swiglu

Op = Callable[..., Tensor]
# exp and sqrt are exact to 2 units in the last place; sums are of a few hundred terms of one size.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(params=["kernel", "reference"])
def ops(request: pytest.FixtureRequest) -> dict[str, Op]:
    if request.param == "reference":
        return {
            "rms_norm": lambda x, w: reference.rms_norm(x, w, 1e-5),
            "swiglu": reference.swiglu,
            "rotate": reference.rotate,
        }
    if not all(extension.has_kernel(op, "cpu") for op in ("rms_norm", "swiglu", "rotate")):
        pytest.skip("the C++ extension does not hold the kernels")
    return {
        "rms_norm": lambda x, w: rms_norm.rms_norm(x, w, eps=1e-5),
        "swiglu": swiglu.swiglu,
        "rotate": rotary.rotate,
    }


def rms_norm_by_definition(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def swiglu_by_definition(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., :half] / (1 + torch.exp(-x[..., :half])) * x[..., half:]


def rotate_by_definition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def check(op: Op, definition: Op, inputs: list[Tensor], dtype: torch.dtype, num_differentiable: int) -> None:
    """Outputs and gradients of op in dtype, and of the definition in float64."""
    results = []
    for function, kind in ((op, dtype), (definition, torch.float64)):
        arguments = [x.to(kind) for x in inputs]
        for x in arguments[:num_differentiable]:
            x.requires_grad_()
        out = function(*arguments)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(kind)
        results.append([out, *torch.autograd.grad(out, arguments[:num_differentiable], grad)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        scale = max(expected.abs().max().item(), 1) if expected.numel() else 1
        torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


# No row, as an expert may get, one and many; fewer features than a vector, and tails; 200 rows are four blocks of the
# weight's gradient.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (5, 1, 16), (200, 96), (65, 2, 1, 67)])
def test_rms_norm(ops: dict[str, Op], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    check(ops["rms_norm"], rms_norm_by_definition, [x, weight], dtype, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (4, 1, 14), (33, 130)])
def test_swiglu(ops: dict[str, Op], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check(ops["swiglu"], swiglu_by_definition, [x], dtype, 1)


def test_swiglu_of_large_numbers(ops: dict[str, Op]) -> None:
    x = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    out = ops["swiglu"](x)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 180.0, 2e4]]), rtol=1e-6, atol=1e-30)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    expected = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 90.0, 1e4]])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(1, 1, 2), (5, 3, 24), (9, 2, 64), (4, 2, 130)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_rotate(
    ops: dict[str, Op], num_tokens: int, num_heads: int, head_dim: int, is_strided: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, num_heads, 3 * head_dim, generator=generator, dtype=torch.float64)
    # As queries and keys are cut from one projection.
    x = x[..., head_dim : 2 * head_dim] if is_strided else x[..., :head_dim].contiguous()
    angles = 100 * torch.randn(num_tokens, head_dim // 2, generator=generator, dtype=torch.float64)
    check(ops["rotate"], rotate_by_definition, [x, angles.cos(), angles.sin()], dtype, 1)
