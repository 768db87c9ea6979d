"""Rotary position embedding of queries and keys in one pass each way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_orz.ops import extension, reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) of every head, turned by the angles of its token.

    x: [T, heads, d]; cos, sin: [T, d/2], those of the angles, of its type and without gradient. Returns [T, heads, d].
    """
    is_typed = x.dtype == cos.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type == "cpu" and is_typed and extension.has_kernel("rotate", "cpu"):
        return _Rotate.apply(x, cos, sin)
    return reference.rotate(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.megatron_orz.rotate(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return torch.ops.megatron_orz.rotate(grad, *ctx.saved_tensors, True), None, None
