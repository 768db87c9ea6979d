"""What a Hugging Face `config.json` says of a decoder, in one form for every supported family.

Read before any model is built: an option that would be ignored in silence is an error that names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.stages import layers_of_chunks

SUPPORTED_FAMILIES = ("llama", "qwen2")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense pre-norm decoder with RMSNorm, RoPE, grouped-query attention and a gated SiLU MLP."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied_embeddings: bool
    """The output weight is the embedding."""

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary, padded so that every tensor-parallel rank holds the same number of rows."""
        return -(-self.vocab_size // tp) * tp

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raises ValueError when the model cannot be cut as `parallel` asks."""
        tp = parallel.tp
        for name, count in (
            ("attention heads", self.num_heads),
            ("key-value heads", self.num_kv_heads),
            ("MLP columns", self.ffn_size),
        ):
            if count % tp:
                raise ValueError(
                    f"parallel.tp {tp} does not divide the model's {count} {name}; "
                    f"choose a tp that divides {self.num_heads}, {self.num_kv_heads} and {self.ffn_size}"
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
        family = json.loads(config_file.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_file} is not valid JSON ({error}); copy the checkpoint again") from error
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(f"{config_file}: model_type {family!r} is not one of {', '.join(SUPPORTED_FAMILIES)}")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    _refuse_unsupported(config, config_file)
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        qkv_bias=family == "qwen2",
        tied_embeddings=config.tie_word_embeddings,
    )


def _refuse_unsupported(config: PretrainedConfig, config_file: Path) -> None:
    allowed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }
    found = {name: getattr(config, name, value) for name, value in allowed.items()}
    found["rope_parameters.rope_type"] = config.rope_parameters.get("rope_type", "default")
    allowed["rope_parameters.rope_type"] = "default"
    for name, value in allowed.items():
        if found[name] != value:
            raise ValueError(f"{config_file}: {name} = {found[name]!r} is not supported, only {value!r}")
