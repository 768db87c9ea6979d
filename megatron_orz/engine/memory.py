"""What a layout needs of each GPU, from the sizes of the model alone.

Parameters, gradients and optimizer states are counted exactly, from the table of weights. Activations follow what the
layers keep for the backward pass with a flash attention kernel; how much the allocator loses is not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_orz.config import DType, ParallelConfig, Recompute
from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.dtypes import TORCH_DTYPES
from megatron_orz.engine.stages import layers_of_chunks, stage_of_layer
from megatron_orz.engine.weight_table import Entry, Replicated, weight_table
from megatron_orz.ops.token_loss import workspace_bytes

BYTES: dict[DType, int] = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """Bytes one model takes on one GPU of a stage."""

    weights: int
    gradients: int
    """float32, whole on every rank."""
    optimizer: int
    """AdamW's two moments, and the float32 weights of a bfloat16 model."""
    activations: int
    """At the peak of a training step, the head's included."""

    @property
    def resident(self) -> int:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer


def parameters_of_stage(
    architecture: Architecture, parallel: ParallelConfig, stage: int, *, value_head: bool
) -> tuple[int, int]:
    """How many parameters one rank of a pipeline stage holds: (outside of experts, in experts)."""
    dense = in_experts = 0
    for entry in weight_table(architecture, value_head=value_head):
        if stage not in _stages(entry, architecture, parallel):
            continue
        if entry.expert is not None:
            in_experts += _num_elements(entry)
        elif type(entry.layout) is Replicated:
            dense += _num_elements(entry)
        elif entry.layer is None:  # rows of the vocabulary
            dense += architecture.padded_vocab_size(parallel.tp) // parallel.tp * architecture.hidden_size
        else:
            dense += _num_elements(entry) // parallel.tp
    return dense, in_experts // parallel.ep


def _num_elements(entry: Entry) -> int:
    return sum(math.prod(shape) for shape in entry.hf.values())


def _stages(entry: Entry, architecture: Architecture, parallel: ParallelConfig) -> set[int]:
    if entry.layer is not None:
        return {stage_of_layer(entry.layer, architecture.num_layers, parallel)}
    is_embedding = entry.megatron_name.startswith("embedding.")
    is_tied = not is_embedding and "model.embed_tokens.weight" in entry.hf
    if is_tied and parallel.pp == 1:
        return set()  # the embedding itself
    return {0 if is_embedding else parallel.pp - 1}


def model_memory(
    architecture: Architecture,
    parallel: ParallelConfig,
    stage: int,
    *,
    world_size: int,
    pack_tokens: int,
    dtype: DType,
    recompute: Recompute,
    value_head: bool,
    distributed_optimizer: bool = True,
) -> ModelMemory:
    """The bytes of one model on a rank of `stage`. pack_tokens: T of the longest pack."""
    dense, in_experts = parameters_of_stage(architecture, parallel, stage, value_head=value_head)
    num_parameters = dense + in_experts
    # Ranks that hold the same parameters share the optimizer states.
    same_dense = same_experts = 1
    if distributed_optimizer:
        same_dense = world_size // (parallel.tp * parallel.pp)
        same_experts = world_size // (parallel.pp * parallel.ep)
    states = 8 if dtype == "float32" else 12
    return ModelMemory(
        weights=num_parameters * BYTES[dtype],
        gradients=num_parameters * 4,
        optimizer=math.ceil(dense / same_dense * states) + math.ceil(in_experts / same_experts * states),
        activations=_activations(architecture, parallel, stage, pack_tokens, dtype, recompute, value_head),
    )


def fullest_stage(
    architecture: Architecture,
    parallel: ParallelConfig,
    *,
    world_size: int,
    pack_tokens: int,
    dtype: DType,
    recompute: Recompute,
    value_head: bool,
    distributed_optimizer: bool = True,
) -> ModelMemory:
    """`model_memory` of the stage that takes most of it."""
    stages = (
        model_memory(
            architecture,
            parallel,
            stage,
            world_size=world_size,
            pack_tokens=pack_tokens,
            dtype=dtype,
            recompute=recompute,
            value_head=value_head,
            distributed_optimizer=distributed_optimizer,
        )
        for stage in range(parallel.pp)
    )
    return max(stages, key=lambda memory: memory.resident + memory.activations)


def layer_activations(architecture: Architecture, parallel: ParallelConfig, *, num_bytes: int) -> float:
    """Bytes a layer keeps of one token for its backward pass, by tensor-parallel rank.

    Inputs and outputs of both norms; queries, keys, values and the attention's output; of a gated MLP its two
    projections, the activation and the product. A token's experts count as MLPs, with copies of their inputs and
    outputs.
    """
    a, tp = architecture, parallel.tp
    hidden = a.hidden_size / (tp if parallel.sequence_parallel else 1)
    q, kv = a.num_heads * a.head_dim / tp, a.num_kv_heads * a.head_dim / tp
    kept = 4 * hidden + 2 * q + 2 * kv
    if a.qk_norm:
        kept += q + kv
    if a.experts is None:
        kept += 4 * a.ffn_size / tp
    else:
        kept += a.experts.experts_per_token * (4 * a.experts.ffn_size + 2 * a.hidden_size) / tp
    return kept * num_bytes


def _activations(
    architecture: Architecture,
    parallel: ParallelConfig,
    stage: int,
    pack_tokens: int,
    dtype: DType,
    recompute: Recompute,
    value_head: bool,
) -> int:
    tokens, num_bytes = math.ceil(pack_tokens / parallel.cp), BYTES[dtype]
    chunks = layers_of_chunks(architecture.num_layers, parallel)[stage :: parallel.pp]
    num_layers = sum(map(len, chunks))
    in_layer = layer_activations(architecture, parallel, num_bytes=num_bytes)
    hidden = architecture.hidden_size / (parallel.tp if parallel.sequence_parallel else 1) * num_bytes
    # Passes of its chunks that a stage has begun and not yet taken back: those of the warm-up, and one more.
    warm_up = parallel.pp - stage - 1
    if parallel.vpp > 1:
        warm_up = 2 * warm_up + (parallel.vpp - 1) * parallel.pp
    in_flight = (warm_up + 1) / parallel.vpp
    if recompute == "full":
        layers = tokens * (in_flight * num_layers * hidden + in_layer)
    else:
        layers = tokens * in_flight * num_layers * in_layer
    head = 0.0
    if stage == parallel.pp - 1:
        head = tokens * architecture.hidden_size * (num_bytes + 4)
        if not value_head:
            rows = architecture.padded_vocab_size(parallel.tp) // parallel.tp
            head += workspace_bytes(tokens, rows, TORCH_DTYPES[dtype], "cuda")
            if not (architecture.tied_embeddings and parallel.pp == 1):
                # What Megatron's hook sees in place of the gradient; beside a tied weight it sees the embedding's.
                head += rows * architecture.hidden_size * num_bytes
    return math.ceil(layers + head)


def kv_cache_bytes(architecture: Architecture, *, num_tokens: int, server_tp: int, num_bytes: int = 2) -> int:
    """Keys and values of `num_tokens` tokens on one of a server's GPUs."""
    kv_heads = max(1, architecture.num_kv_heads // server_tp)
    return 2 * architecture.num_layers * kv_heads * architecture.head_dim * num_tokens * num_bytes


def num_parameters(architecture: Architecture, *, value_head: bool = False) -> int:
    """Parameters of the undivided model."""
    return sum(parameters_of_stage(architecture, ParallelConfig(), 0, value_head=value_head))
