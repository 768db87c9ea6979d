"""The key-value cache of generation in the trainer: a slot for each growing response.

A response's keys and values stay where they are from its prompt to its last token; rows of a batch name their slots. So
responses of any length share a batch without padding, and come and go without a copy of the others. The model is one of
transformers, whose attention is replaced by one that reads the slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from megatron_orz.ops.slot_attention import slot_attention

SLOTS = "slots"
"""The `attn_implementation` to load a model with; its forward pass then takes `rows`, a `Prefill` or a `NextTokens`."""

_ROUNDING = 64
_GROWTH = 1.5


@dataclass(kw_only=True)
class SlotCache:
    """Keys and values of every layer, [slots, kv_heads, capacity, d] each, allocated when they are first written."""

    num_slots: int
    capacity: int = 0
    """Tokens that a slot has room for."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def grow(self, num_tokens: int, kept: Tensor, *, num_slots: int) -> None:
        """Makes room for `num_tokens` in each of `num_slots`; what the slots `kept`, [n], hold moves to 0 .. n - 1."""
        self.capacity = -(-max(num_tokens, int(_GROWTH * self.capacity)) // _ROUNDING) * _ROUNDING
        self.num_slots = num_slots
        for layer, states in self.layers.items():
            self.layers[layer] = self._moved(states[0], kept), self._moved(states[1], kept)

    def write(self, layer: int, slots: Tensor, positions: Tensor | slice, keys: Tensor, values: Tensor) -> None:
        """Puts keys and values of one layer into the slots, [n], at the positions."""
        if layer not in self.layers:
            # What no token has filled is masked, and must yet be finite.
            empty = keys.new_zeros(self.num_slots, keys.shape[1], self.capacity, keys.shape[-1])
            self.layers[layer] = empty, torch.zeros_like(empty)
        for cached, new in zip(self.layers[layer], (keys, values), strict=True):
            cached[slots, :, positions] = new

    def _moved(self, states: Tensor, kept: Tensor) -> Tensor:
        _, num_heads, length, head_dim = states.shape
        moved = states.new_zeros(self.num_slots, num_heads, self.capacity, head_dim)
        moved[: len(kept), :, :length] = states[kept]
        return moved


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """The first tokens of prompts, each row padded at its end; they fill the slots of the responses to come."""

    cache: SlotCache
    slots: Tensor  # [n] int64
    prompt_of_slot: Tensor  # [n] int64, a row of the prompts

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int) -> Tensor:
        """query: [P, heads, L, d]; keys, values: [P, kv_heads, L, d]. Returns [P, L, heads, d]."""
        length = query.shape[2]
        of_slots = (x[self.prompt_of_slot] for x in (keys, values))
        self.cache.write(layer, self.slots, slice(length), *of_slots)
        # Padding follows its prompt, where causality keeps it out of sight.
        mask = None
        if 0 < window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        out = scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return out.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class NextTokens:
    """One more token for each of n responses."""

    cache: SlotCache
    slots: Tensor  # [n] int64
    lengths: Tensor  # [n] int64, tokens in the slot before this one

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int) -> Tensor:
        """query: [n, heads, 1, d]; keys, values: [n, kv_heads, 1, d]. Returns [n, 1, heads, d]."""
        self.cache.write(layer, self.slots, self.lengths, keys[:, :, 0], values[:, :, 0])
        all_keys, all_values = self.cache.layers[layer]
        out = slot_attention(
            query[:, :, 0], all_keys, all_values, self.slots, self.lengths + 1, scale=scale, window=window
        )
        return out[:, None]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Prefill | NextTokens,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return rows.attend(layer, query, key, value, scale=scale, window=sliding_window or 0), None


AttentionInterface.register(SLOTS, _attention)
AttentionMaskInterface.register(SLOTS, lambda *args, **kwargs: None)
