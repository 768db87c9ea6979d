"""Where the gradient of a weight is summed: in Megatron's float32 buffer, if the weight has one."""

from typing import NamedTuple

import torch
from torch import Tensor


class WeightGradient(NamedTuple):
    """The gradient of `weight`, to be added to `sum`.

    Megatron's `DistributedDataParallel` gives every parameter a `main_grad`, to which its hook adds what autograd
    brings. An op that adds to `main_grad` itself spares a copy of the weight, and the rounding to its type; autograd
    then gets no gradient. The hook has nothing left to add, or, where the weight is the embedding as well, the
    embedding's gradient alone. While it overlaps the reduction of gradients it demands one all the same: a weight whose
    attribute `demands_gradient` is true gets zeros.

    An op that knows its gradient in the forward pass has added it before the loss can be scaled. Such a loss must be
    backpropagated exactly once with gradient 1, or `main_grad` is wrong: any other gradient is an error.
    """

    weight: Tensor
    sum: Tensor  # of weight's shape, float32 (float64 for a float64 weight)
    is_main_grad: bool

    @classmethod
    def of(cls, weight: Tensor) -> "WeightGradient":
        dtype = wide(weight.dtype)
        main_grad = getattr(weight, "main_grad", None)
        if isinstance(main_grad, Tensor) and main_grad.dtype == dtype:
            return cls(weight, main_grad, True)
        return cls(weight, torch.zeros_like(weight, dtype=dtype), False)

    def for_autograd(self) -> Tensor | None:
        """The gradient that autograd has to be given."""
        if not self.is_main_grad:
            return self.sum.to(self.weight.dtype)
        return torch.zeros_like(self.weight) if getattr(self.weight, "demands_gradient", False) else None

    def for_autograd_of(self, grad_loss: Tensor) -> Tensor | None:
        """The same, after `sum` was made in the forward pass of a loss with this gradient, a scalar.

        Raises RuntimeError for a gradient that comes too late (on CUDA, asynchronously, as a device-side assertion).
        """
        if not self.is_main_grad:
            return (self.sum * grad_loss).to(self.weight.dtype)
        message = "this loss has added its gradient to main_grad already, and cannot be scaled any more"
        torch._assert_async(grad_loss == 1, message)
        return self.for_autograd()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of this type are summed: nothing is rounded to half precision while it is a sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32
