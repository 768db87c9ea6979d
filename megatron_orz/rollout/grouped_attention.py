"""Attention of one new token per row, for models whose query heads share key-value heads.

transformers repeats the keys and values for every query head of a group, which copies the whole cache in every layer
and step. The heads of a group see the same keys, so they can be laid out as positions of one query instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"
"""The `attn_implementation` to load a model with."""


def grouped_sdpa(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, with transformers' signature.

    query: [B, heads, queries, head_dim]; key, value: [B, kv_heads, tokens, head_dim].
    Returns [B, queries, heads, head_dim].
    """
    batch, num_heads, num_queries, head_dim = query.shape
    if num_queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.view(batch, key.shape[1], num_heads // key.shape[1], head_dim)
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return attended.reshape(batch, 1, num_heads, head_dim), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
