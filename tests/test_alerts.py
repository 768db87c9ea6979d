"""Alerts: each is raised where a run goes wrong, and hardly any where it goes well."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_orz.alerts import MIN_STEPS, REWARD, SPIKE_FLOORS, WINDOW, Alerts
from megatron_orz.logs import METRICS_FILE, RunLog
from megatron_orz.types import Metrics

# Every metric that is watched, of the 40 steps of three runs of examples/demo.py: seeds and machines differ.
CURVES = json.loads((Path(__file__).parent / "demo_metrics.json").read_text())


def raised(rows: list[Metrics]) -> list[tuple[int, str]]:
    alerts = Alerts()
    return [(step, alert.metric) for step, row in enumerate(rows) for alert in alerts.watch(row)]


def rows_of(curve: dict[str, list[float]]) -> list[Metrics]:
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]


@pytest.mark.parametrize("run", range(len(CURVES)))
def test_a_run_that_goes_well_raises_nothing(run: int) -> None:
    assert raised(rows_of(CURVES[run])) == []


@pytest.mark.parametrize(
    ("metric", "spoil"),
    [
        ("critic/loss", lambda x: 100 * x),
        ("policy/loss", lambda x: x + 0.5),
        ("policy/grad_norm", lambda x: 100 * x),
        ("critic/grad_norm", lambda x: 100 * x),
        ("log_prob_mismatch/mean", lambda x: 0.02),
        ("log_prob_mismatch/max", lambda x: 0.5),
        ("critic/loss", lambda x: math.nan),
        ("policy/grad_norm", lambda x: math.inf),
    ],
)
def test_a_spike_in_a_real_curve_raises_one_alert_at_its_step(metric: str, spoil: Callable[[float], float]) -> None:
    for curve in CURVES:
        rows = rows_of(curve)
        rows[25][metric] = spoil(rows[25][metric])
        assert raised(rows) == [(25, metric)]


@pytest.mark.parametrize("collapse_to", [0.0, 0.1, 0.3])
def test_a_reward_that_collapses_raises_one_alert_within_three_steps(collapse_to: float) -> None:
    for curve in CURVES:
        rows = rows_of(curve)
        for row in rows[25:]:
            row[REWARD] = collapse_to
        [(step, metric)] = raised(rows)
        assert metric == REWARD
        assert 25 <= step <= 28


def test_a_single_bad_step_of_the_reward_is_no_collapse() -> None:
    for curve in CURVES:
        rows = rows_of(curve)
        rows[25][REWARD] = 0.0
        assert raised(rows) == []


def test_random_metrics_raise_few_alerts() -> None:
    """Log-normal metrics with a factor of 1.6 between steps, rewards of 512 rollouts at any rate of success."""
    generator = random.Random(0)
    num_steps, num_alerts = 0, 0
    for _ in range(60):
        rate = generator.random()
        rows = [
            {name: generator.lognormvariate(-3, 0.47) for name in SPIKE_FLOORS}
            | {REWARD: sum(generator.random() < rate for _ in range(512)) / 512}
            for _ in range(200)
        ]
        num_steps += len(rows)
        num_alerts += len(raised(rows))
    print(f"{num_alerts} alerts in {num_steps} steps of {len(SPIKE_FLOORS) + 1} metrics")
    assert num_alerts / num_steps < 1 / 5000


def test_a_metric_that_stays_bad_raises_one_alert_until_it_was_good_again() -> None:
    values = [1.0] * 20 + [50.0] * 5 + [1.0] * 5 + [50.0] * 2
    assert raised([{"critic/loss": value} for value in values]) == [(20, "critic/loss"), (30, "critic/loss")]


def test_a_new_level_becomes_the_normal_one() -> None:
    values = [1.0] * 20 + [50.0] * WINDOW + [51.0, 800.0]
    assert raised([{"critic/loss": value} for value in values]) == [
        (20, "critic/loss"),
        (20 + WINDOW + 1, "critic/loss"),
    ]


def test_what_went_before_is_remembered_when_a_run_goes_on() -> None:
    before = [{"critic/loss": 1.0}] * MIN_STEPS
    assert [alert.metric for alert in Alerts(before).watch({"critic/loss": 50.0})] == ["critic/loss"]
    assert Alerts().watch({"critic/loss": 50.0}) == []


def test_an_alert_is_in_the_console_the_metrics_and_tensorboard(tmp_path: Path) -> None:
    console = Console(record=True, width=200, quiet=False)
    with RunLog(tmp_path, num_steps=20, console=console) as log:
        for step in range(20):
            log.record(step, {"critic/loss": 50.0 if step == 15 else 1.0})
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows if "alert/critic/loss" in row] == [15]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("alert/critic/loss")] == [(15, 1.0)]
    said = [line for line in console.export_text().splitlines() if line.startswith("alert")]
    assert said == ["alert at step 15: critic/loss is 50, 49 deviations above its median 1"]
