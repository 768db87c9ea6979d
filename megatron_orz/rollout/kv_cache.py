"""A key-value cache for transformers that grows in place.

The library's own cache is concatenated anew for every token, which copies all of it: at 512 rows that takes several
times longer than the model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

_GROWTH_TOKENS = 128


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, [B, heads, tokens, head_dim]: views of buffers with room for more tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the new tokens; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self._buffers = self.keys, self.values
        length = self.keys.shape[2]
        end = length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = _with_room(self.keys, end), _with_room(self.values, end)
        keys, values = self._buffers
        keys[:, :, length:end] = key_states
        values[:, :, length:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` names, in that order; a row may be named more than once."""
        length = self.keys.shape[2]
        # The buffers keep their room, so that the next token needs no second copy.
        keys, values = self._buffers = self._buffers[0][indices], self._buffers[1][indices]
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model; layers of other kinds (sliding windows, ...) stay as transformers builds them."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_room(states: Tensor, num_tokens: int) -> Tensor:
    """A copy of `states` in a buffer that holds at least `num_tokens` tokens."""
    batch, heads, length, head_dim = states.shape
    capacity = -(-num_tokens // _GROWTH_TOKENS) * _GROWTH_TOKENS
    buffer = torch.empty(batch, heads, capacity, head_dim, dtype=states.dtype, device=states.device)
    buffer[:, :, :length] = states
    return buffer
