"""Where the gradient of a weight is summed: in Megatron's float32 buffer, if the weight has one."""

from typing import NamedTuple

import torch
from torch import Tensor


class WeightGradient(NamedTuple):
    """The gradient of `weight`, to be added to `sum`.

    Megatron's `DistributedDataParallel` gives every parameter a `main_grad`, to which its hook adds what autograd
    brings. An op that adds to `main_grad` itself spares a copy of the weight, and the rounding to its type.
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
        return self._for_hook() if self.is_main_grad else self.sum.to(self.weight.dtype)

    def _for_hook(self) -> Tensor | None:
        """What Megatron's hook expects for a weight whose `main_grad` is complete, as from Megatron's own layers.

        To start reducing `main_grad` the hook wants to see a gradient, which it drops when it is told of the addition.
        `zero_out_wgrad` marks a weight that is the embedding as well: the hook sees the embedding's gradient, and has
        to add it.
        """
        if not hasattr(self.weight, "grad_added_to_main_grad") or getattr(self.weight, "zero_out_wgrad", False):
            return None
        self.weight.grad_added_to_main_grad = True
        return torch.empty_like(self.weight)


class LossGradients:
    """The gradients of a loss in its hidden states and its weight, made in the forward pass. They serve once.

    What is in `main_grad` was added before the loss could be scaled. Such a loss must be backpropagated with gradient
    1, and whoever makes it must backpropagate it, or `main_grad` is wrong.
    """

    def __init__(self, d_hidden: Tensor, d_weight: WeightGradient) -> None:
        self._gradients: tuple[Tensor, WeightGradient] | None = (d_hidden, d_weight)

    def for_autograd(self, grad_loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of hidden and weight, for a gradient of the loss, a scalar.

        Raises RuntimeError when called again, and, unless `grad_loss` is 1, where the weight has a `main_grad` (on CUDA
        asynchronously, as a device-side assertion).
        """
        if self._gradients is None:
            raise RuntimeError("this loss was backpropagated already, and its gradients are gone")
        (d_hidden, d_weight), self._gradients = self._gradients, None
        if d_weight.is_main_grad:
            message = "this loss has added its gradient to main_grad already, and cannot be scaled any more"
            torch._assert_async(grad_loss == 1, message)
        else:
            d_hidden.mul_(grad_loss)
            d_weight.sum.mul_(grad_loss)
        return d_hidden, d_weight.for_autograd()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of this type are summed: nothing is rounded to half precision while it is a sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32
