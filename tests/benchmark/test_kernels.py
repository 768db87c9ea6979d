"""The benchmark of kernels at tiny shapes: what it measures, refuses and writes; not how fast anything is."""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from megatron_orz.benchmark import gae, head, kernels, value
from megatron_orz.benchmark.group import OURS, Finding, Findings, Group, Row, faster_than, share_of_floor, smaller_than
from megatron_orz.benchmark.kernels import Arguments, parse_shape
from megatron_orz.benchmark.measure import interleaved_times, peak_extra_bytes

CPU = torch.device("cpu")
TINY = Arguments(
    shape=("48,16,300",),
    num_sequences=5,
    without=("torch.compile",),
    device="cpu",
    dtype="float32",
    repeats=2,
    memory=False,
)


def test_every_task_is_checked_timed_and_written(tmp_path: Path) -> None:
    console = Console(record=True, width=160, file=(tmp_path / "console").open("w"))
    path = kernels.run(replace(TINY, output=tmp_path / "results" / "tiny.json"), console)
    results = json.loads(path.read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["packages"]["transformers"] == version("transformers")
    rows = {group["task"]: group["rows"] for group in results["groups"]}
    others = {"eager", "chunked"}
    assert {task: set(of_task) for task, of_task in rows.items()} == {
        "log-prob": {OURS, *others},
        "log-prob-gradient": {OURS, *others},
        "token-loss": {OURS, f"{OURS}, separate", *others, "F.linear_cross_entropy"},
        "value-loss": {OURS, "eager"},
        "gae": {OURS, "vectorised", "loop over sequences", "loop in plain floats"},
    }
    for task, of_task in rows.items():
        for name, row in of_task.items():
            assert len(row["times_s"]) == 2, (task, name, row["note"])
            assert 0 < row["min_s"] <= row["median_s"]
            assert all(0 <= error < 1e-4 for error in row["errors"].values())
    for group in results["groups"]:
        assert (group["floor_s"] is None) == (group["task"] == "gae")
        assert group["task"] in console.export_text(clear=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", head.TASKS)
def test_half_precision_has_a_main_grad_and_stays_within_its_limits(task: str, dtype: torch.dtype) -> None:
    group = head.group(task, "tiny", parse_shape("48,16,300"), CPU, dtype)
    finding, is_good = kernels.check(OURS, group.rows[OURS], group)
    assert is_good
    assert finding.errors
    assert max(finding.errors.values()) > 0


@pytest.mark.parametrize("task", head.TASKS)
def test_a_wrong_log_probability_is_seen(task: str) -> None:
    part = head.Head.random(parse_shape("48,16,300"), CPU, torch.float32)
    exact = partial(head.exact_outputs, part, task)

    def shifted(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head.eager_log_prob(hidden, weight * 1.1, targets)

    errors = head.errors_of(head.Implementation(shifted), task, part, exact)
    assert min(errors.values()) > 1e-3


def test_rows_that_fail_or_compute_something_else_are_not_timed() -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("no such kernel\nand a long trace")

    def too_large() -> None:
        raise torch.OutOfMemoryError

    rows = {
        OURS: Row(run=lambda: None, errors=lambda: {"loss": 0.0}),
        "theirs, too large": Row(run=too_large, errors=lambda: {"loss": 0.0}),
        "theirs, wrong": Row(run=lambda: pytest.fail("timed"), errors=lambda: {"loss": 0.5}),
        "theirs, nan": Row(run=lambda: pytest.fail("timed"), errors=lambda: {"loss": float("nan")}),
        "theirs, broken": Row(run=lambda: pytest.fail("timed"), errors=broken),
    }
    group = Group("task", "shape", rows, {"absent": "not installed"}, limits={"loss": 0.1}, our_limits={"loss": 0.1})
    spec = next(kernels.specs(TINY))
    with Progress(disable=True) as progress:
        findings = kernels.measure(group, spec, TINY, progress).rows
    assert {name: len(finding.times_s) for name, finding in findings.items()} == {
        OURS: 2, "theirs, too large": 0, "theirs, wrong": 0, "theirs, nan": 0, "theirs, broken": 0, "absent": 0
    }  # fmt: skip
    assert [finding.note for finding in findings.values()] == [
        "",
        "out of memory",
        "wrong: loss is off by 5.0e-01",
        "wrong: loss is off by nan",
        "fails: RuntimeError: no such kernel",
        "not installed",
    ]


def test_an_error_of_ours_ends_the_run() -> None:
    row = Row(run=lambda: None, errors=lambda: {"loss": 0.5})
    with pytest.raises(SystemExit, match=r"loss is off by 5\.0e-01; nothing was timed"):
        kernels.check(OURS, row, Group("task", "shape", {OURS: row}, our_limits={"loss": 0.1}))


def test_targets_compare_with_what_was_measured() -> None:
    findings = Findings({OURS: Finding([2.0, 1.0], 10), "eager": Finding([1.5, 1.6], 90)}, floor_s=0.9)
    assert faster_than("eager", 1.5).is_met(findings)
    assert not faster_than("eager", 1.6).is_met(findings)
    assert smaller_than("eager", 9).is_met(findings)
    assert not smaller_than("eager", 10).is_met(findings)
    assert share_of_floor(0.9).is_met(findings)
    assert not share_of_floor(0.95).is_met(findings)
    assert faster_than("absent", 1).is_met(findings) is None
    nothing_extra = Findings({OURS: Finding([1.0], 0), "eager": Finding([1.0], 90)})
    assert smaller_than("eager", 10).is_met(nothing_extra)


def test_runs_take_turns() -> None:
    calls: list[str] = []
    times = interleaved_times({name: partial(calls.append, name) for name in "abc"}, CPU, num_repeats=2)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(of_name) for name, of_name in times.items()} == dict.fromkeys("abc", 2)


def test_short_runs_are_repeated_for_longer() -> None:
    begin = time.perf_counter()
    times = interleaved_times({"a": lambda: None, "b": lambda: None}, CPU, num_repeats=2, min_s=0.05)
    assert time.perf_counter() - begin >= 0.05
    assert len(times["a"]) == len(times["b"]) > 2


def test_memory_is_what_a_run_adds_at_its_peak() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept.clear()
        kept.append(torch.ones(4 << 20))
        kept[0] + 1
        torch.ones(8 << 20) + 1

    expected = (4 + 8 + 8) * 4 << 20
    # The kernel counts pages roughly while they are few.
    assert 0.95 * expected < peak_extra_bytes(run, CPU, forget=kept.clear) < 1.2 * expected


@pytest.mark.slow
def test_memory_of_a_row_is_measured_in_a_process_of_its_own() -> None:
    spec = kernels.Spec("token-loss", "512,64,16384", 1, "cpu", "float32")
    rows = spec.build().rows
    logits, d_weight = 512 * 16384 * 4, 64 * 16384 * 4
    # Logits, their softmax, and a gradient of each; ours has one block for all four.
    assert kernels.extra_bytes(spec, "eager", rows["eager"], CPU) > 2 * logits + d_weight
    assert d_weight + logits < kernels.extra_bytes(spec, OURS, rows[OURS], CPU) < 1.5 * logits


def test_gae_of_the_loops_is_that_of_the_vectorised_form() -> None:
    group = gae.group(9, CPU)
    advantages = [row.run() for row in group.rows.values()]
    for other in advantages[1:]:
        torch.testing.assert_close(other, advantages[0], rtol=1e-4, atol=1e-4)


def test_tokens_without_weight_do_not_count_in_the_value_loss() -> None:
    value_head = value.ValueHead.random(parse_shape("200,8,1"), CPU, torch.float32)
    assert 0.1 < (value_head.weights == 0).float().mean() < 0.4


@pytest.mark.parametrize(("changes", "message"), [
    ({"shape": ("8b",)}, '"8b" is neither of smollm2, 0.5b, 7b, 32b nor tokens,hidden,vocabulary'),
    ({"shape": ("3,0,5",)}, "3,0,5"),
    ({"repeats": 0}, "repeats is 0"),
    ({"num_sequences": 0}, "num_sequences is 0"),
    ({"without": (OURS,)}, "beside which everything else is measured"),
])  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_an_absent_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, but there is none"):
        replace(TINY, device="cuda")


@pytest.mark.gpu
def test_every_task_runs_on_cuda(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = replace(TINY, device="cuda", dtype="bfloat16", memory=True, output=tmp_path / "tiny.json")
    results = json.loads(kernels.run(arguments).read_text())
    for group in results["groups"]:
        ours = group["rows"][OURS]
        assert len(ours["times_s"]) == 2
        assert ours["extra_bytes"] is not None


def test_the_command_line_names_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "kernels", "--help"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--only" in capsys.readouterr().out
