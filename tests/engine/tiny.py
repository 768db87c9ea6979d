"""Tiny Hugging Face models and rollouts, the material of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from megatron_orz.types import Experience

VOCAB_SIZE = 131  # odd: tensor parallelism has to pad it


def save_model(
    path: Path, *, family: str = "qwen2", tied: bool = False, vocab_size: int = VOCAB_SIZE
) -> PreTrainedModel:
    """A random model whose every parameter, biases and norms included, matters."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    }
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, rms_norm_eps=1e-6))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5))
    model = model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
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
    names = [name for name in Experience.__dataclass_fields__ if name not in ("cu_seqlens", "max_seqlen")]
    return Experience(
        **{name: torch.cat([getattr(sequence, name) for sequence in sequences]) for name in names},
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
    )


def empty_pack(length: int = 2) -> Experience:
    """A pack without loss tokens, as ranks with fewer packs run."""
    return experience([0] * (length + 1), [], torch.Generator().manual_seed(0))
