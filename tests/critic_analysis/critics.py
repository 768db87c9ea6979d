"""Tiny critics, and responses whose values are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForTokenClassification

from megatron_orz.critic_analysis.values import ValuedResponse
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.generations import Generation


def save_critic(path: Path) -> None:
    """A random critic with the demo's tokenizer, in the form in which a run exports its own."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        initializer_range=0.3,
    )
    Qwen2ForTokenClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def generation(
    prompt_id: int, response_ids: list[int], *, prompt_ids: list[int], response: str = "", reward: float = 0.0
) -> Generation:
    return Generation(
        step=0,
        prompt_id=prompt_id,
        source="test",
        prompt="a prompt",
        response=response,
        answer="",
        extracted=None,
        reward=reward,
        is_correct=reward > 0,
        is_formatted=True,
        timed_out=False,
        finish_reason="stop",
        num_prompt_tokens=len(prompt_ids),
        num_response_tokens=len(response_ids),
        policy_version=0,
        reflection=[],
        repetition=0.0,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
    )


def valued(prompt_id: int, values: list[float], is_repeated: list[bool], *, reward: float = 0.0) -> ValuedResponse:
    """Advantages are reward minus value."""
    return ValuedResponse(
        generation=generation(prompt_id, [0] * len(values), prompt_ids=[0], reward=reward),
        values=np.array(values, dtype=np.float32),
        advantages=(reward - np.array(values)).astype(np.float32),
        is_repeated=np.array(is_repeated),
    )
