"""What a Hugging Face `config.json` says of a decoder, in one form for every supported family.

Read before any model is built: an option that would be ignored in silence is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.families import FAMILIES
from megatron_orz.engine.rope import LlamaScaling, Rope
from megatron_orz.engine.stages import layers_of_chunks
from megatron_orz.json_file import read_json


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture-of-experts layers: each token runs through its best few experts, weighted by softmax."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Columns of one expert's MLP."""
    renormalise: bool
    """The weights of the chosen experts are scaled to sum to 1."""
    dense_layers: frozenset[int]
    """Layers that have a plain MLP instead."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, RoPE, grouped-query attention and gated SiLU MLPs or experts."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope: Rope
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    """Queries and keys are normalised head by head before the rotation."""
    tied_embeddings: bool
    """The output weight is the embedding."""
    experts: Experts | None

    @property
    def has_dense_layers(self) -> bool:
        """Some layer has a plain MLP."""
        return self.experts is None or bool(self.experts.dense_layers)

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary, padded so that every tensor-parallel rank holds the same number of rows."""
        return -(-self.vocab_size // tp) * tp

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raises ValueError when the model cannot be cut as `parallel` asks."""
        tp = parallel.tp
        counts = {"attention heads": self.num_heads, "key-value heads": self.num_kv_heads}
        if self.has_dense_layers:
            counts["MLP columns"] = self.ffn_size
        for name, count in counts.items():
            if count % tp:
                *firsts, last = map(str, counts.values())
                raise ValueError(
                    f"parallel.tp {tp} does not divide the model's {count} {name}; "
                    f"choose a tp that divides {', '.join(firsts)} and {last}"
                )
        num_experts = self.experts.num_experts if self.experts else 1
        if num_experts % parallel.ep:
            raise ValueError(
                f"parallel.ep {parallel.ep} does not divide the model's {num_experts} experts; choose an ep that does"
                if self.experts
                else f"parallel.ep {parallel.ep} deals out experts, but the model has none; set it to 1"
            )
        if self.experts and tp > 1 and not parallel.sequence_parallel:
            raise ValueError(
                f"a model with experts on parallel.tp {tp} needs parallel.sequence_parallel, "
                "or every tensor-parallel rank would route every token; set it"
            )
        layers_of_chunks(self.num_layers, parallel)


def read_architecture(path: Path) -> Architecture:
    """Reads `path/config.json`.

    Raises ValueError for a missing or malformed file, a family that is not supported, or an option of it that is not.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{path} holds no config.json; model.path must be a Hugging Face checkpoint directory")
    try:
        options = read_json(config_file)
    except ValueError as error:
        raise ValueError(f"{error}; copy the checkpoint again") from error
    family = str(options.get("model_type") if isinstance(options, dict) else None)
    if family not in FAMILIES:
        raise ValueError(
            f"{config_file}: model_type {family!r} is not one of {', '.join(FAMILIES)}; choose another model"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers checks options with errors of many types
        raise ValueError(f"{config_file} is not one transformers reads ({error}); mend or copy it again") from error
    for option, found, supported in _unsupported_options(config):
        raise ValueError(
            f"{config_file}: {option} = {found!r} is not supported, only {supported}; choose another model"
        )
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        rope=_rope(config),
        norm_eps=config.rms_norm_eps,
        qkv_bias=FAMILIES[family].has_qkv_bias,
        qk_norm=FAMILIES[family].has_qk_norm,
        tied_embeddings=config.tie_word_embeddings,
        experts=_experts(config) if FAMILIES[family].experts else None,
    )


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: PretrainedConfig) -> Rope:
    parameters = config.rope_parameters
    scaling = None
    if parameters.get("rope_type") == "llama3":
        scaling = LlamaScaling(
            factor=parameters["factor"],
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_max_position=parameters["original_max_position_embeddings"],
        )
    return Rope(theta=parameters["rope_theta"], head_dim=_head_dim(config), scaling=scaling)


def _experts(config: PretrainedConfig) -> Experts:
    if config.model_type == "mixtral":
        return Experts(
            num_experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
            ffn_size=config.intermediate_size,
            renormalise=True,
            dense_layers=frozenset(),
        )
    dense = {
        layer
        for layer in range(config.num_hidden_layers)
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    }
    return Experts(
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
        dense_layers=frozenset(dense),
    )


SUPPORTED_OPTIONS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "router_jitter_noise": 0.0,
    "quantization_config": None,
}
"""The only supported value of options that some family knows."""


def _unsupported_options(config: PretrainedConfig) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, value, what is supported instead)."""
    for name, supported in SUPPORTED_OPTIONS.items():
        if (found := getattr(config, name, supported)) != supported:
            yield name, found, repr(supported)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        yield (
            "sliding_window",
            window,
            f"None, or no less than max_position_embeddings {config.max_position_embeddings}",
        )
    rope = config.rope_parameters
    if (rope_type := rope.get("rope_type", "default")) not in ("default", "llama3"):
        yield "rope_parameters.rope_type", rope_type, "'default' and 'llama3'"
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "rope_parameters.partial_rotary_factor", share, "1.0"
    if getattr(config, "norm_topk_prob", True) and getattr(config, "num_experts_per_tok", 2) < 2:
        yield "num_experts_per_tok", config.num_experts_per_tok, "2 and more where the weights of experts sum to 1"
