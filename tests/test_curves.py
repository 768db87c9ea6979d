"""Pictures of runs: what is drawn in which colour, and what a mean over seeds is."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from megatron_orz.curves import LAYOUT, PANELS, draw_curves, group_seeds, mean_over_runs
from megatron_orz.logs import RunLog
from megatron_orz.types import Metrics


def write_run(run_dir: Path, rows: list[Metrics]) -> Path:
    with RunLog(run_dir, num_steps=len(rows), console=Console(quiet=True)) as log:
        for step, row in enumerate(rows):
            log.record(step, row)
    return run_dir / "metrics.jsonl"


def a_run(num_steps: int, *, offset: float = 0.0) -> list[Metrics]:
    return [
        {
            "reward/mean": step / num_steps + offset,
            "policy/entropy": math.nan if step == 0 else 2 - step / num_steps,
            "critic/explained_variance": -30.0 if step == 0 else 0.5,
            "response/wrong_length_mean": 20.0,
            "log_prob_mismatch/max": 1e-5,
            "evaluation/digits/avg@4": 0.5 + offset,
        }
        for step in range(num_steps)
    ]


def num_blue_and_red_pixels(picture: Path) -> tuple[int, int]:
    hue, saturation, _ = Image.open(picture).convert("HSV").split()
    hues = hue.histogram(saturation.point(lambda s: 255 * (s > 64), mode="1"))
    return sum(hues[140:170]), sum(hues[:20])


def test_each_run_has_its_colour(tmp_path: Path) -> None:
    """The first run is blue, the second red; a run without metrics leaves the frames empty."""
    paths = [write_run(tmp_path / name, a_run(n)) for name, n in (("empty", 0), ("first", 12), ("second", 40))]
    picture = tmp_path / "curves.png"
    draw_curves(paths[0], picture)
    assert num_blue_and_red_pixels(picture) == (0, 0)
    draw_curves(paths[1], picture)
    blue, red = num_blue_and_red_pixels(picture)
    assert blue > 1000
    assert red == 0
    draw_curves(paths[1:], picture)
    blue, red = num_blue_and_red_pixels(picture)
    assert blue > 1000
    assert red > 1000


def test_seeds_share_a_colour_and_widen_into_a_band(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run-seed{seed}", a_run(40, offset=0.2 * seed)) for seed in range(3)]
    draw_curves(paths[:1], tmp_path / "one.png")
    draw_curves(paths, tmp_path / "band.png")
    # The band is pale: count every pixel that is not grey.
    one, band = (
        np.count_nonzero(np.ptp(np.asarray(Image.open(tmp_path / name).convert("RGB"), dtype=int), axis=2) > 16)
        for name in ("one.png", "band.png")
    )
    assert num_blue_and_red_pixels(tmp_path / "band.png")[1] == 0
    assert band > 1.5 * one


def test_runs_are_grouped_by_their_name_without_the_seed() -> None:
    names = ["/r/ppo-seed0", "/r/grpo/seed1", "/r/ppo-seed12", "/r/demo-1", "/r/demo", "/r/grpo/seed2", "/r/reseeded"]
    groups = group_seeds([Path(name, "metrics.jsonl") for name in names])
    assert {name: [str(path.parent) for path in paths] for name, paths in groups.items()} == {
        "ppo": ["/r/ppo-seed0", "/r/ppo-seed12"],
        "grpo": ["/r/grpo/seed1", "/r/grpo/seed2"],
        "demo-1": ["/r/demo-1"],
        "demo": ["/r/demo"],
        "reseeded": ["/r/reseeded"],
    }


def test_the_mean_is_over_the_runs_that_measured_a_step() -> None:
    runs: list[list[Metrics]] = [
        [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 2, "b": 9.0}],
        [{"step": 0, "a": 4.0}, {"step": 1, "a": math.nan}, {"step": 3, "a": 7.0}],
        [{"step": 0, "a": 4.0}],
    ]
    steps, means, deviations = mean_over_runs(runs, "a")
    assert (steps, means) == ([0, 1, 3], [3.0, 2.0, 7.0])
    assert deviations == pytest.approx([np.std([1, 4, 4], ddof=1), 0, 0])


def test_every_panel_has_a_place() -> None:
    assert set(LAYOUT) - {";"} == PANELS.keys()


def test_the_tool_draws_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", a_run(3))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "run"), "--output", str(tmp_path / "run.svg")])
    runpy.run_path("tools/plot.py", run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'run.svg'}\n"
    assert "<svg" in (tmp_path / "run.svg").read_text()

    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path("tools/plot.py", run_name="__main__")
    assert exit_.value.code == 2
    assert "does not exist; give directories of runs that have finished a step" in capsys.readouterr().err
