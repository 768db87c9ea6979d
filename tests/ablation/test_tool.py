"""tools/ablate.py as a user runs it: real runs of a tiny model, made once, gone on with, and compared."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from megatron_orz.ablation.plan import make_plan
from megatron_orz.logs import read_metrics
from megatron_orz.recipe_file import read_recipe
from tests.ablation.runs import rows_of, write_run

ROOT = Path(__file__).parents[2]


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code; imports are shared with other tests."""
    monkeypatch.setattr(sys, "argv", ["tools/ablate.py", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        runpy.run_path(str(ROOT / "tools" / "ablate.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sets", "kl", "lambda"], "--sets lambda is unknown; choose among algorithms, gae-lambda, kl"),
        (["--num-ranks", "0"], "--num-ranks 0 is not at least 1"),
        (["--run-timeout-s", "-1"], "--run-timeout-s -1 is not positive"),
        (["--recipe", "none.py"], "there is no recipe none.py"),
        (["--steps", "0"], "ppo.num_steps 0 is not at least 1"),
        (["--seeds", "0", "0"], "--seeds 0 0 names none, or one twice"),
        (["--sets", "kl", "--draw-only"], "holds no finished run of these sets; leave --draw-only out"),
        (["--sets", "kl", "--", "--policy.path", "nowhere"], "baseline-seed0: nowhere"),
        (["--sets", "kl", "--", "--kl.reference", "nowhere"], "kl-loss-seed0: nowhere"),
    ],
)
def test_what_a_user_can_mend_is_said_before_any_run(
    arguments: list[str],
    sentence: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = [] if "--recipe" in arguments else ["--recipe", str(home / "recipe.py")]
    assert in_process(monkeypatch, *recipe, *arguments) == 2
    # What is wrong with an option itself is said in a frame, on several lines.
    assert sentence in " ".join(capsys.readouterr().err.replace("|", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_the_sets_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(monkeypatch, "--list") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["penalty", "--kl.coefficient", "0.05", "--kl.estimator", "k1", "--kl.place", "reward"] in rows


def test_finished_runs_are_drawn_and_those_of_another_recipe_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = home / "recipe.py"
    given = ["--recipe", str(recipe), "--sets", "gae-lambda", "--seeds", "0", "--output", str(tmp_path), "--draw-only"]
    plan = make_plan(read_recipe(recipe), sets=["gae-lambda"], seeds=[0], output=tmp_path, options=[])
    for run in plan.runs:
        write_run(run, rows_of(run, (0.25, 0.5), score=plan.score))
    assert in_process(monkeypatch, *given) == 0
    assert "| 0.95 | 1 | 25.0 | 50.0 | +25.0 | +0.0 |" in capsys.readouterr().out
    assert (tmp_path / "ablation_gae-lambda.png").stat().st_size > 10_000
    assert in_process(monkeypatch, *given, "--", "--ppo.clip-eps", "0.3") == 2
    assert "holds a run of another recipe: ppo.clip_eps is 0.3, was 0.2; set --output" in capsys.readouterr().err


def ablate(home: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = ["--recipe", home / "recipe.py", "--sets", "gae-lambda", "--seeds", "0", "--output", output]
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "ablate.py", *given, *arguments],
        capture_output=True,
        text=True,
        timeout=550,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


@pytest.mark.slow
def test_variants_are_trained_once_gone_on_with_and_compared(home: Path, tmp_path: Path) -> None:
    """Two variants of two steps; a live run in the way of one; the same again; then a third step."""
    baseline, variant = tmp_path / "baseline-seed0", tmp_path / "gae-lambda-0.95-seed0"
    variant.mkdir()
    with FileLock(variant / ".lock"):
        done = ablate(home, tmp_path)
    assert done.returncode == 2
    assert "gae-lambda-0.95-seed0 failed: exit code 2: error: " in done.stderr
    assert "in use by a live run" in done.stderr
    assert "1/2 baseline-seed0  held out" in done.stdout
    assert "1 of 2 runs are not finished, and left out: gae-lambda-0.95-seed0" in done.stdout

    log = (tmp_path / "baseline-seed0.log").read_text()
    done = ablate(home, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "baseline-seed0.log").read_text() == log, "a finished run was started again"
    config = json.loads((variant / "config.json").read_text())
    assert (config["ppo"]["gae_lambda"], config["ppo"]["num_steps"]) == (0.95, 2)
    first, last = (read_metrics(variant / "metrics.jsonl")[row]["evaluation/held_out/avg@2"] for row in (0, -1))
    results = json.loads((tmp_path / "ablations.json").read_text())
    found = results["sets"]["gae-lambda"]["0.95"]["runs"]["gae-lambda-0.95-seed0"]
    assert (found["first_score"], found["last_score"]) == (first, last)
    assert results["environment"]["commit"]
    assert "| 0.95 | 1 |" in (tmp_path / "ablations.md").read_text()
    with Image.open(tmp_path / "ablation_gae-lambda.png") as picture:
        assert picture.convert("HSV").getchannel("S").point(lambda s: 255 * (s > 64)).getbbox() is not None

    done = ablate(home, tmp_path, "--steps", "3")
    assert done.returncode == 0
    for run_dir in (baseline, variant):
        assert "going on from the checkpoint after 2 steps" in (tmp_path / f"{run_dir.name}.log").read_text()
        assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
