"""Comparisons as Markdown tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from megatron_orz.ablation.plan import Plan
from megatron_orz.ablation.results import LATE_METRICS, VariantResult
from megatron_orz.ablation.sets import SETS
from megatron_orz.ablation.statistics import standard_error
from megatron_orz.evaluation.scores import Estimate

HEADINGS = {
    "reward/mean": ("reward", ".3f"),
    "response/length_mean": ("length", ".1f"),
    "policy/entropy": ("entropy", ".3f"),
    "critic/explained_variance": ("explained", ".2f"),
    "log_prob_mismatch/mean": ("mismatch", ".0e"),
}


def markdown(results: Mapping[str, Sequence[VariantResult]]) -> str:
    """A table for each set: held-out scores in percent with their standard errors, and the late metrics."""
    return "\n".join(f"## {name}\n\n{SETS[name].question}.\n\n{_table(rows)}" for name, rows in results.items())


def _table(results: Sequence[VariantResult]) -> str:
    headings = ["variant", "seeds", "held-out before", "after", "gain", "against the first row"]
    headings += [HEADINGS[metric][0] for metric in LATE_METRICS]
    lines = [headings, ["---"] * len(headings)]
    for result in results:
        scores = result.last_scores
        error = standard_error(scores)
        spread = "" if math.isnan(error) else f" ± {100 * error:.1f}"
        before = fmean(run.first_score for run in result.runs)
        cells = [result.variant, str(len(scores)), f"{100 * before:.1f}", f"{100 * fmean(scores):.1f}{spread}"]
        cells += [_interval(result.gain), _interval(result.difference)]
        for metric in LATE_METRICS:
            value = result.late(metric)
            cells.append("-" if value is None else f"{value:{HEADINGS[metric][1]}}")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _interval(estimate: Estimate | None) -> str:
    """In percentage points; a single seed has no interval."""
    if estimate is None:
        return "-"
    value = f"{100 * estimate.value:+.1f}"
    return value if math.isinf(estimate.low) else f"{value} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def as_json(plan: Plan, results: Mapping[str, Sequence[VariantResult]]) -> dict[str, Any]:
    """Every run and what follows from them; null is what is not known."""
    return {
        "score": plan.score,
        "sets": {
            name: {
                result.variant: {
                    "options": SETS[name].variants.get(result.variant, ""),
                    "runs": {f"{result.run_name}-seed{run.seed}": asdict(run) for run in result.runs},
                    "mean": fmean(result.last_scores),
                    "standard_error": _finite(standard_error(result.last_scores)),
                    "gain": _estimate(result.gain),
                    "difference": _estimate(result.difference),
                }
                for result in rows
            }
            for name, rows in results.items()
        },
    }


def _estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {name: _finite(value) for name, value in asdict(estimate).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
