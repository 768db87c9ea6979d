"""Lets megatron-core's own linear layers add the gradient of a weight to `main_grad` without apex.

`LinearWithGradAccumulationAndAsyncCommunication.backward` (`tensor_parallel/layers.py`) calls apex's extension
`fused_weight_gradient_mlp_cuda` for that; without it the layers refuse `gradient_accumulation_fusion`, and each
backward pass makes a gradient of the weight's size, which a hook adds. PyTorch's matrix product with an addend does
the same work.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


class _WeightGradients:
    """The two functions of apex's extension that megatron-core calls."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
        """main_grad += grad_outputs^T inputs. inputs: [T, I]; grad_outputs: [T, O]; main_grad: [O, I] float32."""
        transposed = grad_outputs.t()
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(transposed, inputs)
        elif inputs.is_cuda:
            torch.addmm(main_grad, transposed, inputs, out_dtype=main_grad.dtype, out=main_grad)
        else:  # the CPU has no product of half precision with a sum in float32
            main_grad.add_(transposed @ inputs)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
        """The same where `main_grad` has the type of the weights."""
        main_grad.addmm_(grad_outputs.t(), inputs)


def install() -> None:
    """Takes the place of apex's extension where that is not installed."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _WeightGradients
        layers._grad_accum_fusion_available = True
