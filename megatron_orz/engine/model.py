"""Builds policy and critic as megatron-core `GPTModel`s from an `Architecture`.

The head is deferred: the last pipeline stage returns hidden states, and the engine applies the head (the output
weight through `ops.linear_log_prob`, or the value head) outside, so that no full logits are ever made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_orz.config import DType, Recompute, ValueHeadInit
from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.attention import PackedAttention
from megatron_orz.engine.dtypes import TORCH_DTYPES
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.stages import layers_of_chunks
from megatron_orz.ops.rms_norm import rms_norm
from megatron_orz.ops.swiglu import swiglu


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that sequence parallelism can use: megatron-core's wrapper refuses it (`transformer/torch_norm.py`)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums the gradient of such a weight over the tensor-parallel ranks.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H]."""
        assert self.eps is not None
        return rms_norm(x, self.weight, eps=self.eps)


class GatedSilu(MegatronModule):
    """The activation between the projections of a feed-forward layer, [..., 2 F] -> [..., F]."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class ValueHead(torch.nn.Module):
    """A linear map from a hidden state to a value, without bias, whole on every tensor-parallel rank."""

    def __init__(self, hidden_size: int, *, init: ValueHeadInit, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(1, hidden_size)
        if init == "normal":
            weight.normal_(std=math.sqrt(1 / (hidden_size + 1)), generator=generator)
        else:
            weight.uniform_(-math.sqrt(5), math.sqrt(5), generator=generator)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T] float32."""
        return (hidden.float() @ self.weight.float().t()).squeeze(1)


class HeadlessGPTModel(GPTModel):
    """A `GPTModel` whose last stage returns hidden states, and whose rotary angles follow `position_ids`.

    `PackedAttention` turns queries and keys, by cosines and sines that are computed once a pack.
    """

    @property
    def output_weight(self) -> Tensor:
        """[V/tp, H], this rank's rows, in the padded vocabulary; of a policy, on the last stage only."""
        is_tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary_pos_emb, *rest = super()._preprocess(*args, **kwargs)
        # [longest, 1, 1, d], the angles of the pairs twice
        angles = rotary_pos_emb[:, 0, 0].chunk(2, dim=-1)[0].index_select(0, kwargs["position_ids"][0])
        dtype = self.config.params_dtype
        kwargs["packed_seq_params"].rotation = angles.cos().to(dtype), angles.sin().to(dtype)
        return (decoder_input, None, *rest)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def build_model(
    architecture: Architecture, mesh: Mesh, *, dtype: DType, recompute: Recompute, value_head: ValueHead | None
) -> list[HeadlessGPTModel]:
    """Builds this rank's model chunks, without weights: `weights.load` fills them."""
    config = _transformer_config(architecture, mesh, TORCH_DTYPES[dtype], recompute=recompute)
    return [_build_chunk(architecture, mesh, config, index, value_head) for index in range(mesh.config.vpp)]


def _build_chunk(
    architecture: Architecture, mesh: Mesh, config: TransformerConfig, index: int, value_head: ValueHead | None
) -> HeadlessGPTModel:
    is_last = mesh.is_last_stage and index == mesh.config.vpp - 1
    vp_stage = index if mesh.config.vpp > 1 else None
    layers = layers_of_chunks(architecture.num_layers, mesh.config)[index * mesh.pp + mesh.pp_rank]
    if uses_transformer_engine(mesh):
        from megatron.core.extensions.transformer_engine import TENorm

        layer_spec, norm = _transformer_engine_spec, TENorm
    else:
        layer_spec, norm = _local_spec, RMSNorm
    block = TransformerBlockSubmodules(
        layer_specs=[layer_spec(architecture, layer) for layer in layers], layer_norm=norm
    )
    gpt = HeadlessGPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=architecture.padded_vocab_size(mesh.tp),
        max_sequence_length=architecture.max_position,
        pre_process=mesh.is_first_stage and index == 0,
        post_process=is_last,
        share_embeddings_and_output_weights=architecture.tied_embeddings and value_head is None,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    gpt.rotary_pos_emb.inv_freq = architecture.rope.frequencies()
    # The angles are gathered by position: a context-parallel rank takes its own from the whole table.
    gpt.rotary_pos_emb.cp_group = None
    if value_head is not None and is_last:
        gpt.output_layer = value_head.to(config.params_dtype)
    for name, parameter in gpt.named_parameters():
        if ".local_experts." in name:
            # Summed over the ranks that hold the same experts. megatron-core says so only where ep > 1: elsewhere
            # tensor-parallel ranks, each with its own tokens, would miss each other's part in silence.
            setattr(parameter, "allreduce", False)  # noqa: B010
    return gpt.to(mesh.device)


def uses_transformer_engine(mesh: Mesh) -> bool:
    """Layers are TransformerEngine's wherever it is installed beside CUDA."""
    return bool(HAVE_TE) and mesh.device.type == "cuda"


def _num_experts(architecture: Architecture, layer: int) -> int | None:
    """None where the layer has a plain MLP."""
    experts = architecture.experts
    return None if experts is None or layer in experts.dense_layers else experts.num_experts


def _local_spec(architecture: Architecture, layer: int) -> ModuleSpec:
    num_experts = _num_experts(architecture, layer)
    spec = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    parts, attention = spec.submodules, spec.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = parts.mlp.submodules if num_experts is None else parts.mlp.submodules.experts.submodules
    mlp.activation_func = GatedSilu
    if num_experts is not None:
        # In checkpoints a norm goes by the name it has where it is fused with the layer that follows; this one is not.
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec


def _transformer_engine_spec(architecture: Architecture, layer: int) -> ModuleSpec:
    """Norms fused with the projections after them; attention stays ours, which knows packs and context slices."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=_num_experts(architecture, layer), qk_layernorm=architecture.qk_norm
    )
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def _transformer_config(
    architecture: Architecture, mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute
) -> TransformerConfig:
    recompute_options: dict[Recompute, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=not uses_transformer_engine(mesh),  # a module of the spec, here `GatedSilu`
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp,
        context_parallel_size=mesh.cp,
        sequence_parallel=mesh.config.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Packs differ in length; megatron-core accepts that only beside this dispatcher, dense models included.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **_expert_options(architecture, mesh),
        # Gradients are sums of weighted token losses: nothing divides them by micro-batches or ranks.
        calculate_per_token_loss=True,
        # The weights are loaded, never drawn.
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=True,
        # Fused kernels that need apex or TransformerEngine, or that only CUDA has.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recompute_options[recompute],
        **_pipeline_options(architecture.num_layers, mesh),
    )


def _expert_options(architecture: Architecture, mesh: Mesh) -> dict[str, Any]:
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_layer_freq": [int(layer not in experts.dense_layers) for layer in range(architecture.num_layers)],
        # Softmax over all experts and then the best, or over the best alone: the same as scaling these to sum to 1.
        "moe_router_pre_softmax": not experts.renormalise,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": mesh.config.ep,
        "expert_tensor_parallel_size": 1,
    }


def _pipeline_options(num_layers: int, mesh: Mesh) -> dict[str, Any]:
    if mesh.pp == 1:
        return {}
    layout = [["decoder"] * len(layers) for layers in layers_of_chunks(num_layers, mesh.config)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    options: dict[str, Any] = {"pipeline_model_parallel_size": mesh.pp, "pipeline_model_parallel_layout": layout}
    if mesh.config.vpp > 1:
        # Batched, the sends of both directions between two stages can be taken for one another (seen with gloo).
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return options
