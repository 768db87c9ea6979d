"""Models with random weights and rollouts with random tokens, the same for everything that is compared."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_orz.data.packing import pack
from megatron_orz.types import Experience, Grade, Prompt, Rollout

ModelName = Literal["smollm2", "0.5b", "1.5b", "7b"]

LONGEST_OVER_MEDIAN = 16
"""Of the lengths of responses. In the recipe, 8000 tokens are allowed, which is 16 times 500."""
SHARE_CUT = 0.01
"""Responses that reach the longest length allowed."""

QWEN = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6}
MODELS: dict[ModelName, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        **QWEN,
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        **QWEN,
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "7b": {
        **QWEN,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
"""Published shapes: SmolLM2-135M and Qwen2.5."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long prompts and responses are."""

    num_sequences: int
    prompt_tokens: int
    """Of every prompt."""
    max_response_tokens: int
    """The longest response."""


def response_lengths(num_responses: int, longest: int, *, seed: int) -> list[int]:
    """Lengths in random order: evenly spaced quantiles of a log-normal distribution, cut at `longest`.

    Its median is `longest / LONGEST_OVER_MEDIAN`, and SHARE_CUT of it is cut. The longest is always there.
    """
    median = longest / LONGEST_OVER_MEDIAN
    sigma = math.log(LONGEST_OVER_MEDIAN) / NormalDist().inv_cdf(1 - SHARE_CUT)
    quantiles = (NormalDist(math.log(median), sigma).inv_cdf((i + 0.5) / num_responses) for i in range(num_responses))
    lengths = [min(longest, max(1, round(math.exp(quantile)))) for quantile in quantiles]
    lengths[-1] = longest
    random.Random(seed).shuffle(lengths)
    return lengths


def random_rollouts(lengths: Lengths, *, vocab_size: int, seed: int) -> list[Rollout]:
    """Graded rollouts of random tokens, each of a prompt of its own."""
    rng = random.Random(seed)
    grade = Grade(reward=1.0, is_correct=True, is_formatted=True, timed_out=False, extracted=None)
    return [
        Rollout(
            prompt=Prompt(
                prompt_id=index,
                token_ids=rng.choices(range(vocab_size), k=lengths.prompt_tokens),
                answer="",
                source="random",
            ),
            response_ids=rng.choices(range(vocab_size), k=length),
            rollout_log_probs=[-math.log(vocab_size)] * length,
            finish_reason="stop",
            policy_version=0,
            grade=grade,
        )
        for index, length in enumerate(response_lengths(lengths.num_sequences, lengths.max_response_tokens, seed=seed))
    ]


def random_experience(
    rollouts: Sequence[Rollout], *, max_pack_tokens: int, vocab_size: int, seed: int
) -> list[Experience]:
    """Packs of the rollouts with random estimates, such as an untrained model would get: some ratios are clipped."""
    generator = torch.Generator().manual_seed(seed)
    experience = []
    for batch in pack(rollouts, max_pack_tokens=max_pack_tokens, seed=seed):
        size = batch.tokens.shape[0]
        noise, values, advantages, returns = torch.randn(4, size, generator=generator)
        experience.append(
            Experience.from_batch(
                batch,
                old_log_probs=0.2 * noise - math.log(vocab_size),
                old_values=values,
                advantages=advantages,
                returns=returns,
            )
        )
    return experience


def model_config(name: ModelName, *, num_layers: int | None = None, vocab_size: int | None = None) -> PretrainedConfig:
    """A published shape, with fewer layers or words where they are given."""
    options = dict(MODELS[name])
    options["num_hidden_layers"] = num_layers or options["num_hidden_layers"]
    options["vocab_size"] = vocab_size or options["vocab_size"]
    return AutoConfig.for_model(options.pop("model_type"), **options)


def save_random_model(config: PretrainedConfig, path: Path, *, dtype: torch.dtype, seed: int = 0) -> None:
    """Writes a Hugging Face checkpoint with the weights a model starts from, normal with 0.02."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
