"""The names of weights: which Hugging Face tensors make up each Megatron parameter, as one table per family.

A row reads: Megatron parameter, how it is joined and cut (`weight_table.py`), and its Hugging Face tensors with the
names of their sizes. Rows of a layer leave out the layer's prefix; `{expert}` counts the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Cut: TypeAlias = Literal["whole", "columns", "vocabulary", "qkv", "gate_up"]
Table: TypeAlias = Mapping[str, tuple[Cut, Mapping[str, str]]]

EMBEDDING: Table = {"embedding.word_embeddings.weight": ("vocabulary", {"model.embed_tokens.weight": "vocab hidden"})}
FINAL_NORM: Table = {"decoder.final_layernorm.weight": ("whole", {"model.norm.weight": "hidden"})}
LM_HEAD: Table = {"output_layer.weight": ("vocabulary", {"lm_head.weight": "vocab hidden"})}
TIED_LM_HEAD: Table = {"output_layer.weight": ("vocabulary", {"model.embed_tokens.weight": "vocab hidden"})}
VALUE_HEAD: Table = {"output_layer.weight": ("whole", {"score.weight": "one hidden"})}

ATTENTION: Table = {
    "input_layernorm.weight": ("whole", {"input_layernorm.weight": "hidden"}),
    "self_attention.linear_qkv.weight": (
        "qkv",
        {
            "self_attn.q_proj.weight": "q hidden",
            "self_attn.k_proj.weight": "kv hidden",
            "self_attn.v_proj.weight": "kv hidden",
        },
    ),
    "self_attention.linear_proj.weight": ("columns", {"self_attn.o_proj.weight": "hidden q"}),
    "pre_mlp_layernorm.weight": ("whole", {"post_attention_layernorm.weight": "hidden"}),
}
QKV_BIAS: Table = {
    "self_attention.linear_qkv.bias": (
        "qkv",
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "kv", "self_attn.v_proj.bias": "kv"},
    ),
}
QK_NORM: Table = {
    "self_attention.q_layernorm.weight": ("whole", {"self_attn.q_norm.weight": "head"}),
    "self_attention.k_layernorm.weight": ("whole", {"self_attn.k_norm.weight": "head"}),
}
MLP: Table = {
    "mlp.linear_fc1.weight": ("gate_up", {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"}),
    "mlp.linear_fc2.weight": ("columns", {"mlp.down_proj.weight": "hidden ffn"}),
}
QWEN_EXPERTS: Table = {
    "mlp.router.weight": ("whole", {"mlp.gate.weight": "experts hidden"}),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        "gate_up",
        {
            "mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
            "mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden",
        },
    ),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": (
        "columns",
        {"mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn"},
    ),
}
MIXTRAL_EXPERTS: Table = {
    "mlp.router.weight": ("whole", {"block_sparse_moe.gate.weight": "experts hidden"}),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        "gate_up",
        {
            "block_sparse_moe.experts.{expert}.w1.weight": "expert_ffn hidden",
            "block_sparse_moe.experts.{expert}.w3.weight": "expert_ffn hidden",
        },
    ),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": (
        "columns",
        {"block_sparse_moe.experts.{expert}.w2.weight": "hidden expert_ffn"},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The rows of one layer: attention, and an MLP or experts."""

    attention: Table
    mlp: Table
    experts: Table | None = None

    @property
    def has_qkv_bias(self) -> bool:
        return QKV_BIAS.keys() <= self.attention.keys()

    @property
    def has_qk_norm(self) -> bool:
        return QK_NORM.keys() <= self.attention.keys()


FAMILIES: Mapping[str, Family] = {
    "llama": Family(attention=ATTENTION, mlp=MLP),
    "mistral": Family(attention=ATTENTION, mlp=MLP),
    "mixtral": Family(attention=ATTENTION, mlp=MLP, experts=MIXTRAL_EXPERTS),
    "qwen2": Family(attention={**ATTENTION, **QKV_BIAS}, mlp=MLP),
    "qwen3": Family(attention={**ATTENTION, **QK_NORM}, mlp=MLP),
    "qwen3_moe": Family(attention={**ATTENTION, **QK_NORM}, mlp=MLP, experts=QWEN_EXPERTS),
}
"""By the `model_type` of config.json."""
