"""Tiny Hugging Face models and rollouts, the material of the engine's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_orz.types import Experience

VOCAB_SIZE = 131  # odd: tensor parallelism has to pad it

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"rms_norm_eps": 1e-6},
    "llama": {"rms_norm_eps": 1e-5},
    "llama3": {  # of the 8 frequencies, the last two are stretched in full and two before them in part
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "mistral": {"head_dim": 32, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 32, "rms_norm_eps": 1e-6},
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen3_moe_unnormalised": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Options of each kind of model, besides its sizes."""


def config_of(
    family: str, *, tied: bool = False, vocab_size: int = VOCAB_SIZE, num_layers: int = 4
) -> PretrainedConfig:
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    }
    return AutoConfig.for_model(**{"model_type": family, **sizes, **FAMILIES[family]})


def save_model(
    path: Path, *, family: str = "qwen2", tied: bool = False, vocab_size: int = VOCAB_SIZE, num_layers: int = 4
) -> PreTrainedModel:
    """A random model whose every parameter, biases and norms included, matters."""
    torch.manual_seed(7)
    config = config_of(family, tied=tied, vocab_size=vocab_size, num_layers=num_layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
            if "mlp.gate.weight" in name:
                parameter.mul_(5)  # no two experts nearly tie for a token: the choice is the same in any order of sums
    model.save_pretrained(path)
    return model.eval()


def experience(prompt: list[int], response: list[int], generator: torch.Generator) -> Experience:
    """One sequence as a pack of its own, with made-up estimates."""
    tokens = prompt + response
    n = len(tokens) - 1
    random = lambda: torch.randn(n, generator=generator)  # noqa: E731
    loss_mask = torch.arange(n) >= len(prompt) - 1
    return Experience(
        tokens=torch.tensor(tokens[:-1]),
        targets=torch.tensor(tokens[1:]),
        position_ids=torch.arange(n),
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        max_seqlen=n,
        loss_mask=loss_mask,
        rewards=torch.zeros(n),
        rollout_log_probs=torch.zeros(n),
        old_log_probs=-4 + 0.3 * random(),
        old_values=0.3 * random(),
        ref_log_probs=torch.zeros(n),
        advantages=random(),
        returns=random(),
    )


def random_sequences(num: int, seed: int = 5) -> list[Experience]:
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for _ in range(num):
        prompt_length, response_length = torch.randint(2, 24, (2,), generator=generator).tolist()
        ids = torch.randint(0, VOCAB_SIZE, (prompt_length + response_length,), generator=generator).tolist()
        sequences.append(experience(ids[:prompt_length], ids[prompt_length:], generator))
    return sequences


def concatenate(sequences: list[Experience], *, multiple: int = 1) -> Experience:
    """Lays sequences end to end, padded with a masked sequence up to a multiple: written apart from `data.packing`."""
    total = sum(len(sequence.tokens) for sequence in sequences)
    if padding := -total % multiple:
        generator = torch.Generator().manual_seed(0)
        filler = experience([0] * (padding + 1), [], generator)
        sequences = [*sequences, filler]
    lengths = [len(sequence.tokens) for sequence in sequences]
    return Experience(
        **{
            name: torch.cat([getattr(sequence, name) for sequence in sequences]) for name in sequences[0].token_arrays()
        },
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
    )


def empty_pack(length: int = 2) -> Experience:
    """A pack without loss tokens, as ranks with fewer packs run."""
    return experience([0] * (length + 1), [], torch.Generator().manual_seed(0))
