"""The repacked weights of vLLM's CPU kernels: completes its weight reload, and reads them back.

Upstream, at the end of a reload:

- vllm/model_executor/model_loader/reload/layerwise.py, finalize_layerwise_processing, skips a layer none of whose own
  weights were loaded. A tied output head owns none, so that its packed copy, made by
  vllm/model_executor/layers/vocab_parallel_embedding.py, UnquantizedEmbeddingMethod.process_weights_after_loading,
  stays as it was: the logits are those of the old embeddings.
- vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, _setup_kernel, lets the experts pack their
  weights when they are loaded first, and never again: the kernel takes unpacked weights for packed ones.

Neither raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

_UNIT_ROWS = 256
"""Columns of a packed weight that are read at once."""


def repack(model: torch.nn.Module) -> None:
    """Packs anew what a reload leaves as it is; nothing to do where nothing is packed."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
        if (experts := _packed_experts(module)) is not None:
            experts.process_weights_after_loading(module)


def held_columns(module: torch.nn.Module, name: str, num_columns: int) -> Iterator[tuple[int, Tensor]]:
    """What a module computes with as one of its parameters, a matrix [R, num_columns] by its last dimension.

    Yields (first column, [R, some columns]).
    """
    parameter = getattr(module, name).data
    if name == "weight" and hasattr(module, "cpu_linear"):
        yield from _columns_of_linear(module, parameter, num_columns)
    elif (experts := _packed_experts(module)) is not None and parameter.dim() == 3:
        yield 0, _unpacked(parameter, experts.isa).view(-1, num_columns)
    else:
        yield 0, parameter.reshape(-1, num_columns)


def _packed_experts(module: torch.nn.Module) -> Any:
    """The experts' kernel of a layer that keeps their weights packed, or None."""
    if not current_platform.is_cpu():
        return None
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts  # not of builds for GPUs

    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    return experts if isinstance(experts, CPUUnquantizedExperts) and not experts._use_zentorch else None


def _columns_of_linear(module: torch.nn.Module, weight: Tensor, num_columns: int) -> Iterator[tuple[int, Tensor]]:
    """The product with the unit matrix: exact, as each of its sums has one term that is not zero."""
    cpu_linear: Callable[[Tensor, Tensor, None], Tensor] = vars(module)["cpu_linear"]
    for first in range(0, num_columns, _UNIT_ROWS):
        units = torch.zeros(min(_UNIT_ROWS, num_columns - first), num_columns, dtype=weight.dtype)
        units.diagonal(first).fill_(1)
        yield first, cpu_linear(units, weight, None).t()


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    """[experts, N, K], of which every expert's elements lie in another order: that in which packing brings their
    positions, of which one byte is packed at a time, because every type holds the numbers up to 256."""
    size = packed[0].numel()
    positions = torch.arange(size)
    order = torch.zeros(size, dtype=torch.int64)
    for shift in range(0, max(size - 1, 1).bit_length(), 8):
        digits = ((positions >> shift) & 0xFF).to(packed.dtype).view_as(packed[:1])
        order += cpu_prepack_moe_weight(digits, isa).flatten().to(torch.int64) << shift
    unpacked = torch.empty_like(packed)
    unpacked.view(len(packed), size)[:, order] = packed.reshape(len(packed), size)
    return unpacked
