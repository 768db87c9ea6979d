"""Completes vLLM's weight reload for tied embeddings on the CPU.

Upstream: vllm/model_executor/model_loader/reload/layerwise.py, finalize_layerwise_processing, which skips a layer
none of whose own weights were loaded; and vllm/model_executor/layers/vocab_parallel_embedding.py,
UnquantizedEmbeddingMethod.process_weights_after_loading, which packs a copy of the weight for the CPU's kernels.

A tied output head owns no weight of its own, so the reload leaves its packed copy as it was: the logits stay those of
the old embeddings, without an error.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


def repack_output_head(model: torch.nn.Module) -> None:
    """Packs the output head's current weight anew; nothing to do where the head has no packed copy."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
