"""Responses of a transformers model to a batch of prompts: one prefill per prompt, then one token per row and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.kv_cache import growing_cache
from megatron_orz.rollout.sampling import StopStrings, draw, sampling_log_probs
from megatron_orz.types import FinishReason

_COMPACT_BELOW = 7 / 8
"""Share of rows still growing under which the finished ones are dropped from the batch. Dropping copies the cache,
which costs about as much as one step reads of it."""


@dataclass(kw_only=True, slots=True)
class Response:
    """One response while it grows."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of_row: Sequence[int],
    uniforms: Tensor,
    *,
    sampling: SamplingConfig,
    eos_ids: frozenset[int],
    stop_strings: StopStrings,
    on_finished: Callable[[], None],
) -> list[Response]:
    """Draws one response per row; row i answers `prompts[prompt_of_row[i]]` with the random numbers `uniforms[i]`.

    uniforms: [rows, max_response_tokens] float64. Siblings share the prefill of their prompt.
    """
    device = model.device
    responses = [Response() for _ in prompt_of_row]
    input_ids, is_token = _left_padded(prompts, device)
    rows = torch.tensor(prompt_of_row, device=device)
    uniforms = uniforms.to(device)

    cache = growing_cache(model.config)
    is_padded = not bool(is_token.all())
    prompt_length = is_token.sum(-1)
    logits = model(
        input_ids=input_ids,
        attention_mask=is_token if is_padded else None,
        position_ids=(is_token.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]

    # From here on a row is a response. `growing` maps rows to responses.
    cache.batch_select_indices(rows)
    logits, prompt_length, is_token = logits[rows], prompt_length[rows], is_token[rows]
    growing = list(range(len(responses)))
    for step in range(sampling.max_response_tokens):
        log_probs = sampling_log_probs(logits, sampling)
        tokens = draw(log_probs, uniforms[:, step])
        chosen = log_probs.gather(-1, tokens[:, None]).squeeze(-1).tolist()
        if math.isnan(sum(chosen)):
            raise RuntimeError("the model's logits are not numbers (NaN): its weights have diverged")
        is_last = step + 1 == sampling.max_response_tokens
        for index, token, log_prob in zip(growing, tokens.tolist(), chosen, strict=True):
            response = responses[index]
            if response.finish_reason is not None:
                continue
            response.token_ids.append(token)
            response.log_probs.append(log_prob)
            if token in eos_ids or stop_strings.completed_by(response.token_ids):
                response.finish_reason = "stop"
            elif is_last:
                response.finish_reason = "length"
            if response.finish_reason is not None:
                on_finished()

        unfinished = [row for row, index in enumerate(growing) if responses[index].finish_reason is None]
        if not unfinished:
            break
        if len(unfinished) <= _COMPACT_BELOW * len(growing):
            kept = torch.tensor(unfinished, device=device)
            cache.batch_select_indices(kept)
            tokens, prompt_length, is_token, uniforms = (
                values[kept] for values in (tokens, prompt_length, is_token, uniforms)
            )
            growing = [growing[row] for row in unfinished]
        if is_padded:
            is_token = torch.nn.functional.pad(is_token, (0, 1), value=True)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=is_token if is_padded else None,
            position_ids=prompt_length[:, None] + step,
            past_key_values=cache,
        ).logits[:, -1]
    return responses


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts that end together: token ids [P, longest] int64, and [P, longest] bool, False on the padding."""
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    is_token = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        is_token[row, longest - len(prompt) :] = True
    return input_ids.to(device), is_token.to(device)
