"""The benchmark of the trainer with tiny models: what it computes, compares and writes; not how fast anything is."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_orz.algorithms.losses import policy_loss
from megatron_orz.benchmark import train, workload
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.train import BY_LENGTH, PACKED, PADDED, Arguments
from megatron_orz.benchmark.training_report import Phase, Row
from megatron_orz.benchmark.transformers_trainer import packed_rows, padded_rows
from megatron_orz.benchmark.workload import Lengths
from megatron_orz.engine import peak_flops
from megatron_orz.types import Experience

LENGTHS = Lengths(num_sequences=11, prompt_tokens=3, max_response_tokens=48)
TINY = Arguments(
    layers=2,
    vocabulary=300,
    num_sequences=11,
    prompt_tokens=3,
    max_response_tokens=48,
    max_pack_tokens=60,
    padded_rows=4,
    device="cpu",
    repeats=2,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the trainer would use the GPU")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    monkeypatch.setitem(workload.MODELS, "smollm2", workload.MODELS["smollm2"] | sizes)
    monkeypatch.setitem(peak_flops.MATRIX_SIZE, "cpu", 128)


def experience() -> list[Experience]:
    rollouts = workload.random_rollouts(LENGTHS, vocab_size=300, seed=0)
    return workload.random_experience(rollouts, max_pack_tokens=60, vocab_size=300, seed=0)


def test_every_task_is_compared_timed_and_written(tmp_path: Path) -> None:
    written = io.StringIO()
    output = train.run(replace(TINY, output=tmp_path / "tiny.json"), Console(file=written, width=140))
    results = json.loads(output.read_text())
    assert [group["task"] for group in results["groups"]] == ["infer", "values", "critic", "policy"]
    for group in results["groups"]:
        assert list(group["rows"]) == [OURS, PACKED, PADDED, BY_LENGTH]
        for row in group["rows"].values():
            assert len(row["times_s"]) == 2
            assert row["tokens_per_s"] == pytest.approx(group["num_tokens"] / row["median_s"])
            assert row["mfu"] == pytest.approx(group["flops"] / row["median_s"] / group["peak"]["rate"])
            assert all(error < 1e-4 for error in row["errors"].values())
            assert row["peak_bytes"] >= 0
    infer, _, critic, policy = results["groups"]
    assert infer["targets"] == []
    assert {target["text"] for target in policy["targets"]} == {
        "at least 1.1 times as fast as HF packed",
        "at least 2 times as fast as HF padded",
    }
    assert policy["flops"] == 3 * infer["flops"]
    assert critic["rows"][OURS]["resident_bytes"].keys() == {"weights", "gradients", "main weights", "optimizer"}
    weights = policy["rows"][PACKED]["resident_bytes"]["weights"]
    assert policy["rows"][OURS]["resident_bytes"]["weights"] == weights
    assert policy["rows"][OURS]["resident_bytes"]["optimizer"] == 2 * weights
    assert "TFLOP of the model" in written.getvalue()


def test_mfu_counts_the_operations_of_the_model_and_no_recomputation() -> None:
    row = Row(times_s=[1.0, 2.0, 9.0], errors={}, resident_bytes={}, peak_bytes=None)
    phase = Phase(
        task="policy",
        shape="",
        num_tokens=10,
        flops=100,
        recomputed_flops=50,
        peak=peak_flops.PeakFlops(rate=200.0, source="nominal"),
        rows={OURS: row},
    )
    assert (phase.mfu(row), phase.tokens_per_s(row)) == (0.25, 5.0)


def test_a_trace_shows_the_operators_of_one_update(tmp_path: Path) -> None:
    others = (PACKED, PADDED, BY_LENGTH)
    arguments = replace(TINY, only=("policy",), without=others, repeats=1, memory=False)
    train.run(
        replace(arguments, traces=tmp_path / "traces", output=tmp_path / "tiny.json"), Console(file=io.StringIO())
    )
    with gzip.open(tmp_path / "traces" / "policy.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 2  # with weight decay and without
    assert "_LinearTokenLossBackward" in names


def test_another_loss_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = train.TransformersTrainer.step
    monkeypatch.setattr(
        train.TransformersTrainer,
        "step",
        lambda self, rows, loss: step(self, rows, partial(policy_loss, clip_eps=0.1)),
    )
    with pytest.raises(SystemExit, match=f"{PACKED} computes something else than {OURS}"):
        train.run(replace(TINY, only=("policy",), output=tmp_path / "tiny.json"), Console(file=io.StringIO()))


def test_padded_rows_hold_every_response_token_once() -> None:
    packs = experience()
    targets = torch.cat([e.targets[e.loss_mask] for e in packs])
    for by_length in (False, True):
        batches = padded_rows(packs, 4, by_length=by_length)
        assert [batch.shape[0] for batch in batches] == [4, 4, 3]
        found = torch.cat([batch.experience.targets[batch.experience.loss_mask] for batch in batches])
        torch.testing.assert_close(found.sort().values, targets.sort().values, rtol=0, atol=0)
        if by_length:
            assert sum(batch.shape[0] * batch.shape[1] for batch in batches) < sum(
                batch.shape[0] * batch.shape[1] for batch in padded_rows(packs, 4)
            )
    assert [rows.shape for rows in packed_rows(packs)] == [(1, len(e.tokens)) for e in packs]


def test_response_lengths_have_the_tail_of_the_recipe() -> None:
    lengths = sorted(workload.response_lengths(2001, 8000, seed=0))
    assert lengths[1000] == 500
    assert lengths[-1] == 8000
    assert sum(length == 8000 for length in lengths) == pytest.approx(0.01 * 2001, abs=1)
    assert workload.response_lengths(50, 512, seed=1) != workload.response_lengths(50, 512, seed=2)


@pytest.mark.parametrize(("name", "millions"), [("smollm2", 134.5), ("0.5b", 494.0), ("1.5b", 1543.7), ("7b", 7615.6)])
def test_shapes_are_those_of_the_models(
    name: workload.ModelName, millions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published numbers of parameters."""
    monkeypatch.undo()
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(workload.model_config(name))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=2e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"repeats": 0}, "repeats is 0"),
    ({"layers": 0}, "layers is 0"),
    ({"max_response_tokens": 58}, "61 tokens do not fit max_pack_tokens 60"),
    ({"without": (OURS,)}, "beside which everything else is measured"),
    ({"device": "cuda"}, "device is cuda"),
])  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
