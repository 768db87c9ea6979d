"""The benchmarks of packing and of rewards on little data: what they compare; not how fast anything is."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_orz.benchmark import packing, rewards, workload
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.workload import Lengths
from megatron_orz.data.packing import pack
from megatron_orz.rewards.verifiers import AnswerVerifier

PACKING = packing.Arguments(
    num_sequences=20, prompt_tokens=3, max_response_tokens=50, max_pack_tokens=64, padded_rows=4, repeats=2
)
REWARDS = rewards.Arguments(num_responses=12, response_words=5, num_workers=1, repeats=1)


@pytest.fixture(autouse=True)
def without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes seconds."""
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.rewards", None)


def test_other_layouts_hold_the_same_tokens() -> None:
    lengths = Lengths(num_sequences=20, prompt_tokens=3, max_response_tokens=50)
    rollouts = workload.random_rollouts(lengths, vocab_size=1000, seed=0)
    expected = sorted(
        torch.cat([batch.targets[batch.loss_mask] for batch in pack(rollouts, max_pack_tokens=64)]).tolist()
    )
    in_order = packing.packed_in_order(rollouts, 64)
    assert max(len(batch["tokens"]) for batch in in_order) <= 64
    padded = packing.padded(rollouts, 4)
    assert [len(batch["tokens"]) for batch in padded] == [4] * 5
    for batches in (in_order, padded):
        found = torch.cat([batch["targets"][batch["loss_mask"]] for batch in batches])
        assert sorted(found.tolist()) == expected


def test_packing_is_timed_and_written(tmp_path: Path) -> None:
    written = io.StringIO()
    output = packing.run(replace(PACKING, output=tmp_path / "packing.json"), Console(file=written, width=140))
    (group,) = json.loads(output.read_text())["groups"]
    assert {OURS, packing.IN_ORDER, packing.PADDED} <= group["rows"].keys()
    for row in group["rows"].values():
        assert len(row["times_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(group["num_items"] / row["median_s"])
    assert "padding" in written.getvalue()
    assert "not installed: pip install megatron_orz[benchmark]" in written.getvalue()


def test_verdicts_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # One comparison that a busy machine does not finish in time would be another verdict.
    monkeypatch.setattr(rewards, "AnswerVerifier", partial(AnswerVerifier, timeout_s=120.0))
    output = rewards.run(replace(REWARDS, output=tmp_path / "rewards.json"), Console(file=io.StringIO()))
    (group,) = json.loads(output.read_text())["groups"]
    assert {OURS, rewards.IN_PROCESS} <= group["rows"].keys()
    in_process = rewards.in_process
    monkeypatch.setattr(rewards, "in_process", lambda items: [1.0 - x for x in in_process(items)])
    items = rewards.make_responses(REWARDS, seed=0)
    with AnswerVerifier(num_workers=1) as verifier, pytest.raises(RuntimeError, match="disagree"):
        rewards.host_task(items, verifier, REWARDS)


def test_half_of_the_answers_are_right() -> None:
    items = rewards.make_responses(replace(REWARDS, integer_share=1.0), seed=0)
    with AnswerVerifier(num_workers=1) as verifier:
        assert sum(rewards.ours(verifier, items)) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(replace, PACKING, max_pack_tokens=52), "less than the longest sequence"),
        (partial(replace, PACKING, repeats=0), "repeats is 0"),
        (partial(replace, REWARDS, integer_share=1.5), "integer_share 1.5 is no share"),
    ],
)
def test_bad_arguments_are_named(make: partial[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
