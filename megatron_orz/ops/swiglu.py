"""The gated activation of a feed-forward layer in one pass over its rows each way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_orz.ops import extension, reference


def swiglu(x: Tensor) -> Tensor:
    """silu(a) b for rows [a, b]. x: [..., 2 F]. Returns [..., F]."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and extension.has_kernel("swiglu", "cpu"):
        return _Swiglu.apply(x.flatten(0, -2).contiguous()).view(*x.shape[:-1], x.shape[-1] // 2)
    return reference.swiglu(x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.megatron_orz.swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.megatron_orz.swiglu_backward(grads[0].contiguous(), *ctx.saved_tensors)
