"""How a token is drawn, and when a response is over: the rules a server follows, for in-process generation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Protocol

import numpy
import torch
from torch import Tensor

from megatron_orz.config import SamplingConfig


class Tokenizer(Protocol):
    """The one thing asked of a tokenizer here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of the ids."""
        ...


def prompt_seed(seed: int, prompt_index: int) -> int:
    """A seed for the `prompt_index`-th prompt of a call, far from those of its neighbours and of other calls.

    A server adds the index of the sibling to it: 62 bits leave room for that.
    """
    return int(numpy.random.SeedSequence([seed, prompt_index]).generate_state(1, numpy.uint64)[0] >> 2)


def uniforms(seed: int, prompt_index: int, response_index: int, num_tokens: int) -> Tensor:
    """The random numbers in [0, 1) one response is drawn with, [num_tokens] float64.

    They depend on nothing but the arguments: a response is the same in whatever batch and on whatever rank it is drawn.
    """
    return torch.from_numpy(numpy.random.default_rng([seed, prompt_index, response_index]).random(num_tokens))


def sampling_log_probs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """log softmax(logits / T) over the tokens that top-k, then top-p keep; -inf elsewhere.

    logits: [B, V]. Returns [B, V] float32.
    """
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k != -1 and sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # A token stays when the more probable ones do not reach top_p without it; the first one always stays.
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(ordered).scatter(-1, order, ordered)
    return logits.log_softmax(-1)


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The token whose interval of the cumulative distribution holds `uniform`.

    log_probs: [B, V], uniform: [B] float64 in [0, 1). Returns [B] int64. Float64 gives even the rarest token of a
    large vocabulary its share.
    """
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    threshold = uniform * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
    return tokens.clamp(max=log_probs.shape[-1] - 1)  # past the end where the probabilities are NaN


class Endings:
    """Tells which of many growing responses have come to their end."""

    def __init__(self, eos_ids: Collection[int], stop_strings: StopStrings, *, vocab_size: int) -> None:
        self._stop_strings = stop_strings
        self._is_eos = torch.zeros(vocab_size, dtype=torch.bool)
        self._is_eos[list(eos_ids)] = True

    def reached(self, tokens: Tensor, response_ids: Callable[[int, int], list[int]]) -> Tensor:
        """Whether the last token of each response, [n] int64 on the CPU, ends it: [n] bool.

        response_ids: (response, n) -> its last n tokens, the last one included.
        """
        is_over = self._is_eos[tokens]
        for index in self._stop_strings.may_be_completed_by(tokens).nonzero().squeeze(1).tolist():
            is_over[index] |= self._stop_strings.completed_by(response_ids(index, self._stop_strings.window))
        return is_over


class StopStrings:
    """Tells when a growing response has completed one of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._last_characters = {string[-1] for string in stop}
        # Every token but an empty one adds a byte at least; the margin allows for a few empty ones, and for the space
        # some tokenizers strip at the beginning of a text.
        self.window = max((len(string.encode()) for string in stop), default=0) + 8
        self._may_complete = lru_cache(maxsize=None)(self._holds_last_character)

    def may_be_completed_by(self, tokens: Tensor) -> Tensor:
        """Where `completed_by` has to look, [n] bool, of responses with these last tokens, [n] int64."""
        if not self._stop:
            return torch.zeros_like(tokens, dtype=torch.bool)
        distinct, place = tokens.unique(return_inverse=True)
        return torch.tensor([self._may_complete(token) for token in distinct.tolist()])[place]

    def completed_by(self, response_ids: list[int]) -> bool:
        """Whether the last of `response_ids` completes a stop string; the earlier ones have not."""
        if not self._may_complete(response_ids[-1]):
            return False
        text = self._decode(response_ids[-self.window :])
        return any(string in text for string in self._stop)

    def _holds_last_character(self, token_id: int) -> bool:
        """A cheap necessary condition, so that few tokens cost a decoding of the tail.

        A part of a multi-byte character decodes to the replacement character, and a token may lose its spaces when it
        is decoded alone: both may complete anything.
        """
        text = self._decode([token_id])
        return bool(self._stop) and (
            not text
            or "\ufffd" in text
            or any(character.isspace() or character in text for character in self._last_characters)
        )

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
