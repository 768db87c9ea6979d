from __future__ import annotations

import torch
from transformers import Qwen2Config
from transformers.cache_utils import DynamicLayer

from megatron_orz.rollout.grouped_attention import grouped_sdpa
from megatron_orz.rollout.kv_cache import GrowingLayer, growing_cache


def test_growing_layer_equals_the_concatenated_one() -> None:
    # 130 tokens cross the end of the first buffer; rows are repeated, then dropped, with room left and without.
    ours, theirs = GrowingLayer(), DynamicLayer()
    batch = 3
    for num_tokens, kept in ((126, [0, 0, 1, 2, 2]), (1, None), (1, [4, 1]), (1, None), (1, [1]), (200, None)):
        keys, values = torch.randn(2, batch, 2, num_tokens, 8)
        for mine, reference in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if kept is not None:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor(kept))
            batch = len(kept)


def test_layers_with_a_sliding_window_keep_their_own_cache() -> None:
    config = Qwen2Config(
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=16,
    )
    kinds = [type(layer).__name__ for layer in growing_cache(config).layers]
    assert kinds == ["GrowingLayer", "DynamicSlidingWindowLayer"]


def test_grouped_attention_equals_repeated_keys_and_values() -> None:
    batch, kv_heads, group, num_tokens, head_dim = 5, 2, 3, 17, 8
    query = torch.randn(batch, kv_heads * group, 1, head_dim)
    keys, values = torch.randn(2, batch, kv_heads, num_tokens, head_dim)
    mask = torch.ones(batch, 1, 1, num_tokens, dtype=torch.bool)
    mask[1, ..., :4] = False
    for attention_mask in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys.repeat_interleave(group, dim=1),
            values.repeat_interleave(group, dim=1),
            attn_mask=attention_mask,
            scale=0.3,
        ).transpose(1, 2)
        actual, _ = grouped_sdpa(torch.nn.Module(), query, keys, values, attention_mask, scaling=0.3)
        torch.testing.assert_close(actual, expected)
