"""Findings of the trainer's benchmark as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from megatron_orz import terminal
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.report import VERDICTS
from megatron_orz.engine.peak_flops import PeakFlops

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one implementation."""

    times_s: Sequence[float]
    errors: Mapping[str, float]
    """Relative differences from ours."""
    resident_bytes: Mapping[str, int]
    """What stays between steps, by part."""
    peak_bytes: int | None
    """The most that a run needs beyond that: activations, logits, what is temporary. None: not measured."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One thing the trainer does, with everything that does it."""

    task: str
    shape: str
    num_tokens: int
    """Positions of all sequences, without padding."""
    flops: int
    """Of the model, recomputation left out."""
    recomputed_flops: int
    """What ours computes a second time."""
    peak: PeakFlops
    rows: Mapping[str, Row]
    targets: Mapping[str, float] = field(default_factory=dict)
    """How many times as fast as each of the others ours shall be."""

    def tokens_per_s(self, row: Row) -> float:
        return self.num_tokens / row.median_s

    def mfu(self, row: Row) -> float:
        """Model FLOPs utilisation: the model's operations a second, as a share of the device's rate."""
        return self.flops / row.median_s / self.peak.rate

    def speed_up(self, other: str) -> float | None:
        """How many times as fast as another implementation ours is; None where that was left out."""
        if other not in self.rows:
            return None
        return self.rows[other].median_s / self.rows[OURS].median_s


def table(phase: Phase) -> Table:
    """A line for each implementation; operations and targets below."""
    lines = [
        f"{phase.num_tokens:,} tokens, {phase.flops / 1e12:.2f} TFLOP of the model, "
        f"{phase.recomputed_flops / 1e12:.2f} recomputed; "
        f"peak {phase.peak.rate / 1e12:.3g} TFLOP/s ({phase.peak.source}); memory in GiB"
    ]
    for other, at_least in phase.targets.items():
        value = phase.speed_up(other)
        verdict = VERDICTS[None if value is None else value >= at_least]
        lines.append(f"target, at least {at_least:g} times as fast as {other}: {verdict}")
    parts = list(phase.rows[OURS].resident_bytes)
    columns = ("median s", "tokens/s", "MFU", "ours faster by", *parts, "beyond")
    result = terminal.table(f"{phase.task}, {phase.shape}", [""], columns, caption="\n".join(lines))
    for name, row in phase.rows.items():
        speed_up = phase.speed_up(name)
        cells = [f"{row.median_s:.3f}", f"{phase.tokens_per_s(row):,.0f}", f"{phase.mfu(row):.0%}"]
        cells.append("" if name == OURS or speed_up is None else f"{speed_up:.2f}x")
        cells += [f"{row.resident_bytes[part] / GIB:.2f}" for part in parts]
        cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}")
        result.add_row(name, *cells, style="bold" if name == OURS else None)
    return result


def as_json(phase: Phase) -> dict[str, Any]:
    """With the derived figures, which readers should not have to compute."""
    rows = {
        name: {
            "median_s": row.median_s,
            "min_s": min(row.times_s),
            "tokens_per_s": phase.tokens_per_s(row),
            "mfu": phase.mfu(row),
            **asdict(row),
        }
        for name, row in phase.rows.items()
    }
    targets = [
        {
            "text": f"at least {at_least:g} times as fast as {other}",
            "value": (value := phase.speed_up(other)),
            "is_met": None if value is None else value >= at_least,
        }
        for other, at_least in phase.targets.items()
    ]
    return {**asdict(phase), "rows": rows, "targets": targets}
