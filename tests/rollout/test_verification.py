"""What is concluded from the digests of the parts that workers hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.rollout import verification
from megatron_orz.rollout.digests import Block, digest
from megatron_orz.rollout.verification import SentDigests, WeightMismatch

NAME = "model.layers.0.self_attn.k_proj.weight"
URL = "http://127.0.0.1:8000"


def part(whole: Tensor, block: Block, place: str = "qkv_proj.weight") -> dict[str, Any]:
    """As a worker answers, lists in place of tuples."""
    row, column, num_rows, num_columns = block
    held = whole[row : row + num_rows, column : column + num_columns]
    return {"block": list(block), "digest": digest(held, row=row, column=column), "place": place}


def compare(sent: Tensor, *workers: list[dict[str, Any]]) -> None:
    digests = SentDigests("full", num_updates=0, dtype=None)
    assert [name for name, _ in digests.watch(iter([(NAME, sent)]))] == [NAME]
    verification.compare(digests.sent, [{NAME: parts} for parts in workers], URL)


TOP, BOTTOM, WHOLE = Block(0, 0, 3, 8), Block(3, 0, 5, 8), Block(0, 0, 8, 8)
LEFT, RIGHT = Block(0, 0, 8, 2), Block(0, 2, 8, 6)


@pytest.mark.parametrize(
    "parts", [[[WHOLE]], [[TOP], [BOTTOM]], [[LEFT], [RIGHT]], [[TOP, BOTTOM]], [[WHOLE], [WHOLE]]]
)
def test_parts_that_make_up_the_tensor_pass(parts: list[list[Block]]) -> None:
    sent = torch.randn(8, 8)
    compare(sent, *([part(sent, block) for block in blocks] for blocks in parts))


def test_a_missing_part_is_named() -> None:
    sent = torch.randn(8, 8)
    with pytest.raises(WeightMismatch, match=rf"{URL} .* 1 of 1 .* \({NAME}: 24 of its 64 elements are held\)"):
        compare(sent, [part(sent, TOP)], [part(sent, TOP)])
    with pytest.raises(WeightMismatch, match="0 of its 64 elements are held"):
        compare(sent, [], [])


def test_another_value_in_one_part_is_found() -> None:
    sent = torch.randn(8, 8)
    changed = sent.clone()
    changed[4, 4] += 1e-6
    with pytest.raises(WeightMismatch, match=r"other values in qkv_proj\.weight"):
        compare(sent, [part(sent, TOP)], [part(changed, BOTTOM)])


def test_of_two_places_the_stale_one_is_named() -> None:
    sent, stale = torch.randn(8, 8), torch.randn(8, 8)
    with pytest.raises(WeightMismatch, match=r"other values in lm_head\.weight"):
        compare(sent, [part(sent, WHOLE, "embed_tokens.weight"), part(stale, WHOLE, "lm_head.weight")])


def test_copies_on_two_workers_must_agree() -> None:
    sent = torch.randn(8, 8)
    changed = sent.clone()
    changed[0, 0] = 0
    with pytest.raises(WeightMismatch, match="other values in second"):
        compare(sent, [part(sent, TOP), part(sent, BOTTOM)], [part(changed, TOP, "second"), part(sent, BOTTOM)])


def test_what_is_sent_is_what_is_compared() -> None:
    """A server of another type holds the converted weights."""
    sent = torch.randn(8, 8)
    digests = SentDigests("full", num_updates=0, dtype=torch.bfloat16)
    assert len(list(digests.watch(iter([(NAME, sent)])))) == 1
    verification.compare(digests.sent, [{NAME: [part(sent.bfloat16().float(), WHOLE)]}], URL)
    with pytest.raises(WeightMismatch):
        verification.compare(digests.sent, [{NAME: [part(sent, WHOLE)]}], URL)
