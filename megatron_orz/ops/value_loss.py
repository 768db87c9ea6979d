"""The critic's head and its clipped squared error, with their gradients, in one pass over the hidden states."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_orz.ops import extension, reference
from megatron_orz.ops.checks import check_value_head
from megatron_orz.ops.main_grad import LossGradients, WeightGradient
from megatron_orz.ops.reference import clipped_squared_error

if extension.NOT_BUILT is None:

    @torch.library.register_fake("megatron_orz::packed_value_loss")
    def _(
        hidden: Tensor,
        head: Tensor,
        old_values: Tensor,
        returns: Tensor,
        weights: Tensor,
        clip_eps: float,
        *,
        d_head: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(returns), torch.empty_like(hidden)


def linear_value_loss(
    hidden: Tensor, head: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """sum_t weights_t * `reference.clipped_squared_error` of the values hidden @ head.

    hidden: [T, H]; head: [1, H] of its type; old_values, returns, weights: [T] float32 (float64 for float64 hidden).
    Returns the loss, a scalar that is differentiable in hidden and head, and the values, [T] without gradient. A token
    of weight 0 has a value and no gradient. Where `main_grad` holds head's gradient, the loss must be backpropagated
    as it is, once: see `main_grad.py`. Raises ValueError when shapes, types or devices do not fit together.
    """
    check_value_head(hidden, head, old_values=old_values, returns=returns, weights=weights)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _LinearValueLoss.apply(hidden, head, old_values, returns, weights, clip_eps)
    values = (hidden.to(returns.dtype) @ head.to(returns.dtype).t()).squeeze(1)
    return _weighted_sum(values, old_values, returns, weights, clip_eps), values


def _weighted_sum(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_eps: float) -> Tensor:
    errors, _ = clipped_squared_error(values, old_values, returns, clip_eps=clip_eps)
    return torch.where(weights != 0, weights * errors, 0.0).sum()


class _LinearValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_eps: float
    ) -> tuple[Tensor, Tensor]:
        d_head = WeightGradient.of(head)
        kernel = extension.has_kernel("packed_value_loss", hidden.device.type, hidden.dtype)
        op = torch.ops.megatron_orz.packed_value_loss if kernel else reference.packed_value_loss
        values, d_hidden = op(
            hidden.contiguous(), head[0], old_values, returns, weights, clip_eps, d_head=d_head.sum[0]
        )
        ctx.gradients = LossGradients(d_hidden, d_head)
        ctx.mark_non_differentiable(values)
        return _weighted_sum(values, old_values, returns, weights, clip_eps), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.for_autograd(grad_loss), None, None, None, None
