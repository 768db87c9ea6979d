"""What is read out of finished runs: against numbers worked out by hand, and as tables, JSON and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_orz.ablation.pictures import draw
from megatron_orz.ablation.plan import Plan, make_plan
from megatron_orz.ablation.report import as_json, markdown
from megatron_orz.ablation.results import read_results, read_run
from megatron_orz.recipe_file import read_recipe
from tests.ablation.runs import rows_of, write_run

DEMO = read_recipe(Path("examples/demo.py"))
T_2 = 4.3027
"""Student's t of two degrees of freedom, 95 %."""

# Run -> held-out scores of the first and the last policy.
SCORES = {
    ("baseline", 0): (0.3, 0.6),
    ("baseline", 1): (0.4, 0.7),
    ("baseline", 2): (0.5, 0.8),
    ("gae-lambda-0.95", 0): (0.3, 0.5),
    ("gae-lambda-0.95", 1): (0.4, 0.5),
    ("gae-lambda-0.95", 2): (0.5, 0.5),
}


def plan_of(output: Path, *, sets: tuple[str, ...] = ("gae-lambda",)) -> Plan:
    return make_plan(DEMO, sets=sets, seeds=[0, 1, 2], output=output, options=["--ppo.num-steps", "8"])


@pytest.fixture
def finished(tmp_path: Path) -> Plan:
    plan = plan_of(tmp_path)
    for run in plan.runs:
        write_run(run, rows_of(run, SCORES[run.name, run.seed]))
    return plan


def test_scores_and_differences_are_those_of_the_seeds(finished: Plan) -> None:
    baseline, variant = read_results(finished)["gae-lambda"]
    assert (baseline.variant, variant.variant) == ("1.0", "0.95")
    assert baseline.difference is None
    # Every seed gains 0.3.
    assert (baseline.gain.value, baseline.gain.low, baseline.gain.high) == pytest.approx((0.3, 0.3, 0.3))
    # -0.1, -0.2, -0.3: mean -0.2, standard deviation 0.1.
    assert variant.difference is not None
    half_width = T_2 * 0.1 / math.sqrt(3)
    assert variant.difference.value == pytest.approx(-0.2)
    assert variant.difference.high - variant.difference.value == pytest.approx(half_width, rel=1e-4)
    assert variant.gain.value == pytest.approx(0.1)


def test_the_late_metrics_are_means_over_the_last_quarter(finished: Plan) -> None:
    """Of 8 steps, the last two: rewards 0.6 and 0.7. The row after the last step has none."""
    result = read_run(finished.of("baseline")[0], finished.score)
    assert result.late == pytest.approx({"reward/mean": 0.65, "policy/entropy": 2.0})
    assert result.train_s == pytest.approx(8 * 1.5 + 2.0)


def test_a_run_that_is_not_finished_is_left_out(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    for run in plan.runs:
        write_run(run, rows_of(run, SCORES[run.name, run.seed]), is_finished=(run.name, run.seed) != ("baseline", 2))
    baseline, variant = read_results(plan)["gae-lambda"]
    assert [run.seed for run in baseline.runs] == [0, 1]
    assert len(variant.runs) == 3
    assert variant.difference is not None
    assert variant.difference.value == pytest.approx(-0.15)  # of the seeds that both have


def test_more_steps_than_were_made_leave_a_run_unfinished(finished: Plan, tmp_path: Path) -> None:
    longer = make_plan(DEMO, sets=["gae-lambda"], seeds=[0], output=tmp_path, options=["--ppo.num-steps", "9"])
    assert finished.runs[0].is_finished
    assert not longer.runs[0].is_finished


def test_a_run_without_its_score_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    write_run(plan.runs[0], rows_of(plan.runs[0], (0.3, 0.6))[:-1])
    with pytest.raises(ValueError, match=r"baseline-seed0.*has no evaluation/held_out/avg@4 at step 7"):
        read_results(plan)


def test_the_table_shows_what_was_found(finished: Plan) -> None:
    lines = markdown(read_results(finished)).splitlines()
    assert lines[0] == "## gae-lambda"
    assert lines[6] == "| 1.0 | 3 | 40.0 | 70.0 ± 5.8 | +30.0 [+30.0, +30.0] | - | 0.650 | - | 2.000 | - | - |"
    assert lines[7].startswith("| 0.95 | 3 | 40.0 | 50.0 ± 0.0 | +10.0 [-14.8, +34.8] | -20.0 [-44.8, +4.8] |")


def test_the_json_is_strict_and_holds_every_run(finished: Plan) -> None:
    content = json.dumps(as_json(finished, read_results(finished)), allow_nan=False)
    variants = json.loads(content)["sets"]["gae-lambda"]
    assert variants["0.95"]["options"] == "--ppo.gae-lambda 0.95"
    assert variants["0.95"]["difference"]["value"] == pytest.approx(-0.2)
    assert {name: run["last_score"] for name, run in variants["1.0"]["runs"].items()} == {
        f"baseline-seed{seed}": score for (name, seed), (_, score) in SCORES.items() if name == "baseline"
    }


def test_one_seed_is_shown_without_an_interval(tmp_path: Path) -> None:
    plan = make_plan(DEMO, sets=["gae-lambda"], seeds=[0], output=tmp_path, options=["--ppo.num-steps", "8"])
    for run in plan.runs:
        write_run(run, rows_of(run, SCORES[run.name, run.seed]))
    results = read_results(plan)
    assert "| 0.95 | 1 | 30.0 | 50.0 | +20.0 | -10.0 |" in markdown(results)
    json.dumps(as_json(plan, results), allow_nan=False)


def test_variants_have_colours_and_seeds_a_band(finished: Plan, tmp_path: Path) -> None:
    results = read_results(finished)["gae-lambda"]
    hues = {}
    for name, shown in (("baseline", results[:1]), ("both", results)):
        draw(finished, "gae-lambda", shown, tmp_path / f"{name}.png")
        hue, saturation, _ = Image.open(tmp_path / f"{name}.png").convert("HSV").split()
        colourful = np.asarray(saturation) > 64
        hues[name] = np.bincount(np.asarray(hue)[colourful], minlength=256)
    assert hues["baseline"][:20].sum() == 0  # no red
    assert hues["both"][:20].sum() > 500
    assert hues["both"][140:170].sum() > 500  # blue
