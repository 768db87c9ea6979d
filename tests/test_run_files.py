"""What a finished run leaves behind, and what the same command makes of it."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_orz.config import to_json
from megatron_orz.conversion.convert import plan_megatron_to_hf
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.logs import read_metrics
from tests.conversion.checkpoints import assert_same_tensors
from tests.recipe import Finished, command_line, sentence, without_times

pytestmark = pytest.mark.usefixtures("own_place")


def test_a_run_leaves_its_files_and_no_others(home: Path, finished: Finished) -> None:
    names = {path.name for path in finished.run_dir.iterdir()}
    files = {"config.json", "curves.png", "final", "metrics.jsonl", "tensorboard"}
    assert names == files | {"checkpoints", "final-critic", "finished", "generations", ".lock"}
    assert {path.name for path in (finished.run_dir / "checkpoints").iterdir()} == {"step-00000002", "latest"}
    config = runpy.run_path(str(home / "recipe.py"))["RECIPE"]
    assert (finished.run_dir / "config.json").read_text() == to_json(replace(config, fresh=True))
    with Image.open(finished.run_dir / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20, "the picture is blank"


def test_tensorboard_holds_what_metrics_jsonl_holds(finished: Finished) -> None:
    rows = read_metrics(finished.run_dir / "metrics.jsonl")
    events = EventAccumulator(str(finished.run_dir / "tensorboard")).Reload()
    assert [row["step"] for row in rows] == [0, 1, 2]
    for metric in ("reward/mean", "policy/grad_norm", "critic/loss", "evaluation/held_out/avg@2"):
        assert [(event.step, event.value) for event in events.Scalars(metric)] == [
            (row["step"], pytest.approx(row[metric])) for row in rows if metric in row
        ]


def test_rows_tell_of_the_memory_of_every_phase_and_model_and_of_early_grades(finished: Finished) -> None:
    *steps, last = read_metrics(finished.run_dir / "metrics.jsonl")
    for row in steps:
        for phase in ("sync", "generate", "reward", "record", "infer", "critic", "policy"):
            assert 0.1 < row[f"memory/{phase}_peak_gib"] < 100
            assert 0 <= row[f"memory/{phase}_beyond_gib"] < row[f"memory/{phase}_peak_gib"]
        for model in ("policy", "critic"):
            weights = row[f"memory/{model}_weights_gib"]
            assert weights > 0
            # Gradients lie in buffers whose ends are padded.
            assert row[f"memory/{model}_gradients_gib"] == pytest.approx(weights, rel=0.01)
            assert row[f"memory/{model}_optimizer_gib"] == pytest.approx(2 * weights, rel=0.01)
        assert 0 <= row["perf/graded_early_share"] <= 1
    assert any(row["perf/graded_early_share"] > 0 for row in steps), "a busy machine may begin none of a step early"
    assert {"memory/sync_peak_gib", "memory/host_gib"} <= last.keys()


def test_transformers_loads_the_final_checkpoint_with_exactly_the_trained_weights(
    home: Path, finished: Finished
) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.run_dir / "final")
    base = AutoModelForCausalLM.from_pretrained(home / "model").state_dict()
    assert model.state_dict().keys() == finished.weights.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, finished.weights[name]), name
        assert not torch.equal(weight, base[name]), f"{name} is not trained"
    tokenizer = AutoTokenizer.from_pretrained(finished.run_dir / "final")
    assert tokenizer("User: 1+2\n<think>")["input_ids"] == build_tokenizer()("User: 1+2\n<think>")["input_ids"]


def test_a_fresh_run_moves_the_first_aside_and_repeats_it(finished: Finished) -> None:
    assert "the run that was in run is now in run-1" in finished.out
    first, second = (without_times(finished.place / name) for name in ("run-1", "run"))
    assert len(first) == 3
    # As text, because nan, which the critic explains of rewards that are all the same, is not equal to itself.
    assert json.dumps(second) == json.dumps(first)
    assert (finished.place / "run-1" / "final").is_dir()


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_same_command_again_finds_nothing_to_do(
    home: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.place)
    before = files_of(finished.run_dir)
    assert command_line(home) == 0
    assert "run holds this run, finished; raise ppo.num_steps or begin anew with --fresh" in capfd.readouterr().out
    assert files_of(finished.run_dir) == before


def test_checkpoints_and_exports_hold_the_final_weights(home: Path, tmp_path: Path) -> None:
    assert command_line(home, "--checkpoint.export-interval", "2") == 0
    plan_megatron_to_hf(tmp_path / "run" / "checkpoints" / "latest" / "policy", tmp_path / "converted").run(
        lambda _: None
    )
    assert [path.name for path in (tmp_path / "run" / "exports").iterdir()] == ["step-00000002"]
    for path in (tmp_path / "run" / "exports" / "step-00000002", tmp_path / "converted"):
        assert_same_tensors(tmp_path / "run" / "final", path)


def test_a_finished_run_goes_on_with_more_steps(home: Path, tmp_path: Path) -> None:
    assert command_line(home) == 0
    assert command_line(home, "--ppo.num-steps", "3") == 0
    assert command_line(home, "--ppo.num-steps", "3", "--run-dir", "whole") == 0
    longer, whole = (without_times(tmp_path / name) for name in ("run", "whole"))
    assert json.dumps(longer) == json.dumps(whole)
    final = "final/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--policy.optimizer.lr 2e-3",
            r"run holds a run of another recipe: policy\.optimizer\.lr is 0\.002, was 0\.001; restore the recipe, .*",
        ),
        ("--ppo.num-steps 1", r"run holds a run of 2 steps, more than ppo\.num_steps 1; raise it, .*--fresh"),
    ],
)
def test_a_run_does_not_go_on_as_another(
    home: Path,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: str,
    expected: str,
) -> None:
    monkeypatch.chdir(finished.place)
    before = files_of(finished.run_dir)
    assert command_line(home, *arguments.split()) == 2
    assert re.fullmatch(expected, sentence(capfd.readouterr().err))
    assert files_of(finished.run_dir) == before


def test_a_directory_in_use_by_a_live_run_is_left_alone(
    home: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.place)
    before = files_of(finished.run_dir)
    with FileLock(finished.run_dir / ".lock"):
        assert command_line(home, "--fresh") == 2
    expected = r"run is in use by a live run; wait for it, or set run_dir"
    assert re.fullmatch(expected, sentence(capfd.readouterr().err))
    assert files_of(finished.run_dir) == before


def test_another_seed_gives_another_run(home: Path, finished: Finished, tmp_path: Path) -> None:
    assert command_line(home, "--seed", "1", "--ppo.num-steps", "1") == 0
    first, other = without_times(finished.run_dir)[0], without_times(tmp_path / "run")[0]
    assert first["response/length_mean"] != other["response/length_mean"]
    assert first["policy/entropy"] != other["policy/entropy"]


def test_the_console_shows_a_line_a_step_and_the_comparison(finished: Finished) -> None:
    steps = [line for line in finished.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["0/2", "1/2", "2/2"]
    assert re.search(r"held_out/avg@2 +\d+\.\d % +\d+\.\d % +[+-]\d+\.\d pp", finished.out)
