"""Findings of the whole loop as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from megatron_orz import terminal
from megatron_orz.benchmark.countdown_work import StepTimes
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.report import VERDICTS

PHASES = ("sync", "generate", "reward", "record", "infer", "critic", "policy")
PARTS = ("weights", "gradients", "main_weights", "optimizer")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Steps of the same work by everything that does it."""

    lengths: str
    shape: str
    num_rollouts: int
    num_response_tokens: int
    num_warm_up: int
    rows: Mapping[str, StepTimes]
    missing: Mapping[str, str]
    """What could not be timed, and why."""
    baseline: str
    target: float
    """How many times as fast as the baseline ours shall be."""

    def times_s(self, name: str) -> list[float]:
        """Seconds of the steps that count."""
        return self.rows[name].seconds[self.num_warm_up :]

    def median_s(self, name: str) -> float:
        return statistics.median(self.times_s(name))

    def speed_up(self, name: str) -> float | None:
        """How many times as fast as `name` ours is."""
        return self.median_s(name) / self.median_s(OURS) if name in self.rows else None

    def median_of(self, name: str, metric: str) -> float | None:
        """Of one of our own runs; None where it has no such metric."""
        rows = self.rows[name].metrics[self.num_warm_up :]
        values = [row[metric] for row in rows if metric in row]
        return statistics.median(values) if values else None


def table(loop: Loop) -> Table:
    """A line for each run: samples and tokens a second, then the seconds of each phase of ours."""
    value = loop.speed_up(loop.baseline)
    verdict = VERDICTS[None if value is None else value >= loop.target]
    caption = (
        f"{loop.num_response_tokens:,} response tokens a step; the phases are ours, in seconds\n"
        f"target, at least {loop.target:g} times as fast as {loop.baseline}: {verdict}"
    )
    for name, why in loop.missing.items():
        caption += f"\n{name} is missing: {why.splitlines()[0]}"
    columns = ("step s", "samples/s", "tokens/s", "ours faster by", "MFU", *PHASES)
    result = terminal.table(f"{loop.lengths} lengths, {loop.shape}", [""], columns, caption=caption)
    for name in loop.rows:
        seconds, speed_up = loop.median_s(name), loop.speed_up(name)
        mfu = loop.median_of(name, "perf/mfu")
        cells = [
            f"{seconds:.3f}",
            f"{loop.num_rollouts / seconds:,.0f}",
            f"{loop.num_response_tokens / seconds:,.0f}",
            "" if name == OURS else f"{speed_up:.2f}x",
            "" if mfu is None else f"{mfu:.0%}",
        ]
        for phase in PHASES:
            of_phase = loop.median_of(name, f"time/{phase}_s")
            cells.append("" if of_phase is None else f"{of_phase:.3f}")
        result.add_row(name, *cells, style="bold" if name == OURS else None)
    return result


def memory_table(loop: Loop) -> Table:
    """A line for each run: the peak of all, then of ours the peak of each phase and what the models hold."""
    held = {part: {name: _held_gib(loop, name, part) for name in loop.rows} for part in PARTS}
    parts = [part for part in PARTS if any(held[part].values())]
    columns = ("peak", *PHASES, *(part.replace("_", " ") for part in parts))
    title = f"memory in MiB, {loop.lengths} lengths"
    result = terminal.table(title, [""], columns, caption="of models, policy and critic together")
    for name, steps in loop.rows.items():
        cells = [f"{steps.peak_bytes / MIB:,.0f}"]
        for phase in PHASES:
            peak_gib = loop.median_of(name, f"memory/{phase}_peak_gib")
            cells.append("" if peak_gib is None else f"{1024 * peak_gib:,.0f}")
        for part in parts:
            cells.append(f"{1024 * held[part][name]:.1f}" if held[part][name] else "")
        result.add_row(name, *cells, style="bold" if name == OURS else None)
    return result


def _held_gib(loop: Loop, name: str, part: str) -> float:
    """Of policy and critic together; 0 of runs that are not ours."""
    return sum(loop.median_of(name, f"memory/{model}_{part}_gib") or 0.0 for model in ("policy", "critic"))


def as_json(loop: Loop) -> dict[str, Any]:
    """With the derived figures."""
    rows = {
        name: {
            "median_s": loop.median_s(name),
            "min_s": min(loop.times_s(name)),
            "times_s": loop.times_s(name),
            "samples_per_s": loop.num_rollouts / loop.median_s(name),
            "tokens_per_s": loop.num_response_tokens / loop.median_s(name),
            "peak_bytes": steps.peak_bytes,
            "warm_up_s": steps.seconds[: loop.num_warm_up],
            "rewards": steps.rewards,
            "metrics": {
                metric: loop.median_of(name, metric) for metric in sorted({m for row in steps.metrics for m in row})
            },
        }
        for name, steps in loop.rows.items()
    }
    value = loop.speed_up(loop.baseline)
    target = {
        "text": f"at least {loop.target:g} times as fast as {loop.baseline}",
        "value": value,
        "is_met": None if value is None else value >= loop.target,
    }
    return {**asdict(loop), "task": f"{loop.lengths} lengths", "rows": rows, "targets": [target]}
