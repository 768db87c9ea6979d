"""What the finished runs of a variant say, together and beside the recipe as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_orz.ablation.plan import BASELINE, Plan, Run
from megatron_orz.ablation.statistics import paired_difference
from megatron_orz.evaluation.scores import Estimate
from megatron_orz.logs import read_metrics
from megatron_orz.types import Metrics

LATE_SHARE = 0.25
"""Share of the steps, the last of them, over which the metrics below are averaged."""

LATE_METRICS = (
    "reward/mean",
    "response/length_mean",
    "policy/entropy",
    "critic/explained_variance",
    "log_prob_mismatch/mean",
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run."""

    seed: int
    first_score: float
    """Held-out score of the base model, in [0, 1]."""
    last_score: float
    """Held-out score after the last step."""
    late: Metrics
    """Means of `LATE_METRICS` over the last steps; a metric the run lacks is left out."""
    train_s: float
    """Seconds of all steps, without start and end."""


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """All finished runs of a variant."""

    variant: str
    run_name: str
    runs: Sequence[RunResult]
    gain: Estimate
    """Last less first held-out score, paired by seed."""
    difference: Estimate | None
    """Last held-out score less the baseline's, paired by seed; None for the baseline and where no seed is common."""

    @property
    def last_scores(self) -> list[float]:
        return [run.last_score for run in self.runs]

    def late(self, metric: str) -> float | None:
        """The mean over the seeds that have it as a number."""
        values = [value for run in self.runs if not math.isnan(value := run.late.get(metric, math.nan))]
        return fmean(values) if values else None


def read_run(run: Run, score: str) -> RunResult:
    """Reads a finished run's metrics. Raises ValueError where its first or last row has no held-out score."""
    rows = read_metrics(run.metrics_path)
    for row in (rows[0], rows[-1]):
        if score not in row:
            raise ValueError(f"{run.metrics_path} has no {score} at step {row['step']:g}; make the run anew")
    num_steps = run.config.ppo.num_steps
    late_rows = [row for row in rows if num_steps * (1 - LATE_SHARE) <= row["step"] < num_steps]
    late = {}
    for metric in LATE_METRICS:
        values = [row[metric] for row in late_rows if not math.isnan(row.get(metric, math.nan))]
        if values:
            late[metric] = fmean(values)
    return RunResult(
        seed=run.seed,
        first_score=rows[0][score],
        last_score=rows[-1][score],
        late=late,
        train_s=sum(value for row in rows for name, value in row.items() if name.startswith("time/")),
    )


def read_results(plan: Plan) -> dict[str, list[VariantResult]]:
    """Set -> results of its variants, the baseline first. Passes over what has no finished run."""
    runs: dict[str, list[RunResult]] = {}
    for run in plan.runs:
        if run.is_finished:
            runs.setdefault(run.name, []).append(read_run(run, plan.score))
    results = {}
    for set_name, variants in plan.sets.items():
        if runs.keys().isdisjoint(variants.values()):
            continue
        baseline = {run.seed: run.last_score for run in runs.get(BASELINE, [])}
        results[set_name] = [
            _result(variant, name, runs[name], baseline=None if name == BASELINE else baseline)
            for variant, name in variants.items()
            if name in runs
        ]
    return results


def _result(variant: str, name: str, runs: Sequence[RunResult], *, baseline: dict[int, float] | None) -> VariantResult:
    runs = sorted(runs, key=lambda run: run.seed)
    last = {run.seed: run.last_score for run in runs}
    gain = paired_difference(last, {run.seed: run.first_score for run in runs})
    assert gain is not None  # every run has both
    difference = None if baseline is None else paired_difference(last, baseline)
    return VariantResult(variant=variant, run_name=name, runs=runs, gain=gain, difference=difference)
