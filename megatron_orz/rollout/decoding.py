"""Responses of a transformers model by continuous batching: a response that ends makes room for the next one.

A row of the batch is a growing response. Every step feeds each row its last token and draws the next; what is asked of
rows is asked of all at once, and Python sees a single response only when it ends, or may have completed a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.sampling import Endings, draw, sampling_log_probs
from megatron_orz.rollout.slots import NextTokens, Prefill, SlotCache
from megatron_orz.types import FinishReason

_REFILL_SHARE = 1 / 8
"""Share of the slots that must be free before others are let in: a prefill of few rows keeps many waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One response as it was drawn."""

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of_row: Sequence[int],
    uniforms: Callable[[int], Tensor],
    *,
    max_rows: int,
    sampling: SamplingConfig,
    endings: Endings,
    on_finished: Callable[[int, Response], None],
) -> None:
    """Draws one response per row; row i answers `prompts[prompt_of_row[i]]` with the random numbers `uniforms(i)`.

    on_finished: called with the row and the response when it ends.
    uniforms: [max_response_tokens] float64 for each row. At most `max_rows` responses grow at a time. Siblings that
    begin together share the prefill of their prompt. Raises RuntimeError when the logits are not numbers.
    """
    num_rows = len(prompt_of_row)
    batch = _Batch(model, sampling, endings, num_slots=min(max_rows, num_rows))
    num_begun = 0
    while num_begun < num_rows or batch.num_growing:
        num_new = min(len(batch.free), num_rows - num_begun)
        if num_new and (not batch.num_growing or len(batch.free) >= _REFILL_SHARE * max_rows):
            rows = range(num_begun, num_begun + num_new)
            num_begun += num_new
            batch.begin(
                rows,
                [prompt_of_row[row] for row in rows],
                prompts,
                torch.stack([uniforms(row) for row in rows]),
                is_last=num_begun == num_rows,
            )
        for row, response in batch.step():
            on_finished(row, response)


class _Batch:
    """The responses that grow. Letters: S slots, n growing responses."""

    def __init__(self, model: PreTrainedModel, sampling: SamplingConfig, endings: Endings, *, num_slots: int) -> None:
        self._model, self._sampling, self._endings = model, sampling, endings
        self._cache = SlotCache(num_slots=num_slots)
        self._is_last = False
        self.free = list(range(num_slots))
        shape, device = (num_slots, sampling.max_response_tokens), model.device
        # Of slots:
        self._tokens = torch.zeros(shape, dtype=torch.int64)  # [S, max_response_tokens] on the CPU, as all three
        self._log_probs = torch.zeros(shape, dtype=torch.float32)
        self._uniforms = torch.zeros(shape, dtype=torch.float64)
        # Of growing responses, [n] int64:
        self._rows = self._slots = self._num_drawn = torch.zeros(0, dtype=torch.int64)
        self._lengths = self._last = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def num_growing(self) -> int:
        return len(self._rows)

    def begin(
        self,
        rows: Sequence[int],
        prompt_of_row: Sequence[int],
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        *,
        is_last: bool,
    ) -> None:
        """Puts one response per row into free slots. is_last: no others will follow."""
        self._is_last = is_last
        slots = torch.tensor([self.free.pop() for _ in rows])
        self._uniforms[slots] = uniforms
        self._rows = torch.cat([self._rows, torch.tensor(rows)])
        self._slots = torch.cat([self._slots, slots])
        self._num_drawn = torch.cat([self._num_drawn, torch.zeros_like(slots)])
        device = self._model.device
        # The last token of a prompt is the first to be fed: its logits are those of the first of the response.
        lengths = torch.tensor([len(prompts[index]) - 1 for index in prompt_of_row], device=device)
        self._lengths = torch.cat([self._lengths, lengths])
        self._last = torch.cat([self._last, torch.tensor([prompts[i][-1] for i in prompt_of_row], device=device)])
        longest = int(lengths.max())
        self._make_room(longest + 1)
        if longest > 0:
            distinct = list(dict.fromkeys(prompt_of_row))
            place = {index: place for place, index in enumerate(distinct)}
            prefill = Prefill(
                cache=self._cache,
                slots=self._slots[-len(rows) :].to(device),
                prompt_of_slot=torch.tensor([place[index] for index in prompt_of_row], device=device),
            )
            heads = [torch.tensor(prompts[index][:-1], dtype=torch.int64) for index in distinct]
            self._run(pad_sequence(heads, batch_first=True).to(device), torch.arange(longest, device=device), prefill)

    def step(self) -> Iterator[tuple[int, Response]]:
        """Draws one token for every row. The rows that end with it, and their responses."""
        self._make_room(int(self._lengths.max()) + 1)
        slots = self._slots.to(self._last.device)
        next_tokens = NextTokens(cache=self._cache, slots=slots, lengths=self._lengths)
        logits = self._run(self._last[:, None], self._lengths[:, None], next_tokens)
        log_probs = sampling_log_probs(logits, self._sampling)
        place = self._slots, self._num_drawn
        self._last = draw(log_probs, self._uniforms[place].to(log_probs.device))
        self._lengths = self._lengths + 1
        self._log_probs[place] = drawn = log_probs.gather(-1, self._last[:, None]).squeeze(-1).cpu()
        self._tokens[place] = tokens = self._last.cpu()
        if drawn.isnan().any():
            raise RuntimeError("the model's logits are not numbers (NaN): its weights have diverged")
        self._num_drawn = self._num_drawn + 1

        is_stopped = self._endings.reached(tokens, self._response_ids)
        is_over = is_stopped | (self._num_drawn == self._sampling.max_response_tokens)
        if not is_over.any():
            return
        for index in is_over.nonzero().squeeze(1).tolist():
            slot, num_tokens = int(self._slots[index]), int(self._num_drawn[index])
            yield (
                int(self._rows[index]),
                Response(
                    token_ids=self._tokens[slot, :num_tokens].tolist(),
                    log_probs=self._log_probs[slot, :num_tokens].tolist(),
                    finish_reason="stop" if is_stopped[index] else "length",
                ),
            )
            self.free.append(slot)
        self._rows, self._slots, self._num_drawn = (x[~is_over] for x in (self._rows, self._slots, self._num_drawn))
        grows = (~is_over).to(self._last.device)
        self._lengths, self._last = self._lengths[grows], self._last[grows]

    def _response_ids(self, index: int, num_last: int) -> list[int]:
        """The last tokens of a growing response, at most `num_last`."""
        slot, end = int(self._slots[index]), int(self._num_drawn[index])
        return self._tokens[slot, max(0, end - num_last) : end].tolist()

    def _run(self, input_ids: Tensor, position_ids: Tensor, rows: Prefill | NextTokens) -> Tensor:
        """The logits of the last position, [n, V]. input_ids: [n, L]; position_ids: [n, L] or [L]."""
        position_ids = position_ids.expand_as(input_ids)
        output = self._model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=1, rows=rows
        )
        return output.logits[:, -1]

    def _make_room(self, num_tokens: int) -> None:
        """Room for this many tokens in every slot. Slots that will not be used any more are given up on the way."""
        if num_tokens <= self._cache.capacity:
            return
        kept = self._slots
        order = torch.cat([kept, torch.tensor(self.free, dtype=torch.int64)])
        order = order[: len(kept)] if self._is_last else order
        self._cache.grow(num_tokens, kept.to(self._last.device), num_slots=len(order))
        self._tokens, self._log_probs, self._uniforms = (
            x[order] for x in (self._tokens, self._log_probs, self._uniforms)
        )
        self._slots = torch.arange(len(kept))
        self.free = list(range(len(kept), len(order)))
