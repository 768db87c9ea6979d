"""Attention of new tokens over a key-value cache in which every sequence has a slot of its own."""

import torch
from torch import Tensor

from megatron_orz.ops import extension, reference


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, *, scale: float, window: int = 0
) -> Tensor:
    """One query per row over the first `lengths` tokens of its slot, of which a window > 0 sees the last ones alone.

    query: [B, heads, d]; keys, values: [S, kv_heads, C, d], contiguous; slots, lengths: [B] int64. Returns
    [B, heads, d]; the formula is in `reference.slot_attention`. Raises ValueError when the query heads cannot share the
    key-value heads evenly; the kernel also when shapes, types, slots or lengths do not fit together.
    """
    num_heads, num_kv_heads = query.shape[1], keys.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    is_typed = query.dtype in (torch.float32, torch.float64)
    if query.device.type == "cpu" and is_typed and extension.has_kernel("slot_attention", "cpu"):
        return torch.ops.megatron_orz.slot_attention(query, keys, values, slots, lengths, scale, window)
    return reference.slot_attention(query, keys, values, slots, lengths, scale, window)
