"""Root mean square normalisation in one pass over the rows each way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_orz.ops import extension, reference


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x_i (mean_j x_j^2 + eps)^(-1/2) w_i over the last dimension. x: [..., H]; weight: [H] of its type."""
    is_typed = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type == "cpu" and is_typed and extension.has_kernel("rms_norm", "cpu"):
        return _RMSNorm.apply(x.flatten(0, -2).contiguous(), weight, eps).view(x.shape)
    return reference.rms_norm(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = torch.ops.megatron_orz.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.megatron_orz.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors), None
