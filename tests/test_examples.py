"""The recipes in examples/: each is complete, and those that a laptop can run do what they say."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_orz.config import Config, SupervisedConfig, to_json
from megatron_orz.data.prompts import render
from megatron_orz.logs import read_metrics

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = [path for path in EXAMPLES if "RECIPE = Config(" in path.read_text()]
SUPERVISED = [path for path in EXAMPLES if "RECIPE = SupervisedConfig(" in path.read_text()]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
RUN_FILES = {
    *("config.json", "metrics.jsonl", "tensorboard", "curves.png", "generations", "vllm.log"),
    *("checkpoints", "final", "final-critic", "finished", ".lock"),
}


def named(path: Path) -> str:
    return path.stem


def recipe_of(path: Path) -> Config:
    recipe = runpy.run_path(str(path))["RECIPE"]
    assert isinstance(recipe, Config)
    return recipe


def checked_again(value: Any) -> Any:
    """The same dataclass built anew from its innermost fields on, so that every `__post_init__` looks at it again."""
    if not dataclasses.is_dataclass(value):
        return value
    values = {field.name: checked_again(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return type(value)(**values)


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_an_example_imports_without_running(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (runpy.run_path(str(path))["__doc__"] or "").count("examples/") >= 1, "the docstring says how to run it"
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_is_complete_and_survives_its_command_line(path: Path) -> None:
    recipe = recipe_of(path)
    assert checked_again(recipe) == recipe
    assert tyro.cli(Config, default=recipe, args=[]) == recipe
    changed = tyro.cli(Config, default=recipe, args=["--ppo.num-steps", "3", "--seed", "8"])
    assert changed == dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, num_steps=3), seed=8)
    assert json.loads(to_json(recipe))["ppo"]["num_steps"] == recipe.ppo.num_steps
    # Checkpoints, metrics and base models go where git does not look.
    assert recipe.run_dir.parts[0] == "runs"


@pytest.mark.parametrize("path", SUPERVISED, ids=named)
def test_a_supervised_recipe_is_complete_and_survives_its_command_line(path: Path) -> None:
    recipe = runpy.run_path(str(path))["RECIPE"]
    assert checked_again(recipe) == recipe
    assert tyro.cli(SupervisedConfig, default=recipe, args=[]) == recipe
    changed = tyro.cli(SupervisedConfig, default=recipe, args=["--num-epochs", "3", "--data.learn", "all"])
    assert changed == dataclasses.replace(recipe, num_epochs=3.0, data=dataclasses.replace(recipe.data, learn="all"))
    assert recipe.run_dir.parts[0] == "runs"


def run_example(name: str, *arguments: str, timeout_s: float, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The example as a user runs it, in the current directory."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def changed_weights(final: Path, base: Path) -> set[str]:
    """Names of the weights in which two checkpoints differ. Those of `final` are finite."""
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(final).state_dict()
    assert after.keys() == before.keys()
    assert all(weight.isfinite().all() for weight in after.values())
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_teaches_a_third_right_to_be_nine_tenths_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to the curves with vLLM: about ten minutes on two cores, the base model included."""
    monkeypatch.chdir(tmp_path)
    done = run_example("demo.py", timeout_s=3500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    run_dir, base = tmp_path / "runs" / "demo", tmp_path / "runs" / "demo-base" / "final"
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES

    rows = read_metrics(run_dir / "metrics.jsonl")
    recipe = recipe_of(ROOT / "examples" / "demo.py")
    last, interval = recipe.ppo.num_steps, recipe.evaluation.interval
    assert [row["step"] for row in rows] == list(range(last + 1))
    scores = {row["step"]: row["evaluation/held_out/avg@4"] for row in rows if "evaluation/held_out/avg@4" in row}
    assert list(scores) == sorted({*range(0, last, interval), last})
    assert 0.20 <= scores[0] <= 0.45
    assert scores[last] >= 0.90
    assert rows[last]["evaluation/held_out/format_share"] >= 0.98
    # float32 on both sides: what is left is the order of sums. Stale weights show as more than 1e-2.
    assert max(row["log_prob_mismatch/max"] for row in rows[:-1]) < 1e-3

    assert len(changed_weights(run_dir / "final", base)) > 10
    assert share_solved_by_transformers(run_dir / "final", base.with_name("held_out.jsonl")) >= 0.75
    assert score_as_base(run_dir / "final") == pytest.approx(scores[last], abs=0.03)
    for layout in ([], ["--parallel.tp", "2"], ["--parallel.pp", "2"]):
        assert first_step("demo.py", *layout)["reward/mean"] == pytest.approx(rows[0]["reward/mean"], abs=0.02)


def share_solved_by_transformers(checkpoint: Path, problems: Path) -> float:
    """Share of the first 16 problems that the checkpoint answers rightly, taking the likeliest token each time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    num_solved = 0
    for problem in map(json.loads, problems.read_text().splitlines()[:16]):
        prompt = tokenizer(render("short", problem["question"]), add_special_tokens=False, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
        num_solved += f"<answer>\\boxed{{{problem['answer']}}}</answer>" in tokenizer.decode(tokens)
    return num_solved / 16


def first_step(name: str, *layout: str) -> dict[str, float]:
    """Metrics of the first step on two ranks."""
    run_dir = Path("runs/two-ranks")
    done = run_example(name, *layout, "--ppo.num-steps", "1", "--run-dir", str(run_dir), num_ranks=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_metrics(run_dir / "metrics.jsonl")[0]


def score_as_base(checkpoint: Path) -> float:
    """The held-out score of a checkpoint from which another run starts, vLLM server included."""
    paths = ("--policy.path", str(checkpoint), "--critic.path", str(checkpoint))
    done = run_example("demo.py", *paths, "--run-dir", "runs/again", "--ppo.num-steps", "1", timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_metrics(Path("runs/again/metrics.jsonl"))[0]["evaluation/held_out/avg@4"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cold_start_teaches_the_demo_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model, then what it learns of the teacher: minutes, half of them the base's."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo_base.py", "sft_cold_start.py"):
        done = run_example(name, timeout_s=900)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
    base, run_dir = tmp_path / "runs" / "demo-base", tmp_path / "runs" / "demo-cold-start"
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert rows[-1]["evaluation/held_out/loss"] < 0.4 * rows[0]["evaluation/held_out/loss"]
    before, after = (share_solved_by_transformers(path / "final", base / "held_out.jsonl") for path in (base, run_dir))
    assert after >= max(before, 0.75)
    assert AutoTokenizer.from_pretrained(run_dir / "final").chat_template is not None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_passes_real_weights_through_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a pretrained model of 135 M parameters on GSM8K, with vLLM."""
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K.name} is not there")
    monkeypatch.chdir(tmp_path)
    done = run_example("smollm2_gsm8k.py", "--data.train", str(GSM8K), timeout_s=3500)
    if "could not be downloaded" in done.stderr:
        pytest.skip("the model could not be downloaded")
    assert done.returncode == 0, done.stderr[-4000:]
    run_dir, base = tmp_path / "runs" / "smollm2-gsm8k", tmp_path / "runs" / "smollm2-base"
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES - {"checkpoints"}

    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[:2]:
        assert row["log_prob_mismatch/max"] < 1e-3
        assert row["policy/grad_norm"] > 0
        assert row["response/length_max"] <= 48
    # Matrices move by about two learning rates, so that the trained model is another one and yet close.
    assert len(changed_weights(run_dir / "final", base)) > 100
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run_dir / "final").state_dict()
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-4
