"""Work of the host, timed as everything else: implementations that take turns, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_orz import terminal
from megatron_orz.benchmark import environment, results
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.measure import Run, interleaved_times


@dataclass(frozen=True, kw_only=True)
class HostTask:
    """One thing that several implementations do."""

    task: str
    shape: str
    num_items: int
    unit: str
    """Of what there are `num_items`: tokens, responses."""
    runs: Mapping[str, Run]
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else is to be said of an implementation, or why it is missing."""
    baselines: Sequence[str] = ()
    """Those that ours shall be at least as fast as."""

    def measure(self, num_repeats: int) -> dict[str, list[float]]:
        """Seconds of each run, after one to warm up; shows how far it is."""
        with terminal.progress() as progress:
            task = progress.add_task(f"{self.task}: timing", total=len(self.runs) * (num_repeats + 1))
            advance = partial(progress.advance, task)
            return interleaved_times(self.runs, torch.device("cpu"), num_repeats=num_repeats, on_run=advance)

    def table(self, times: Mapping[str, Sequence[float]]) -> Table:
        """A line for each implementation."""
        columns = ("median ms", f"{self.unit}/s", "ours faster by")
        result = terminal.table(f"{self.task}, {self.shape}", [""], columns, notes=True)
        ours = statistics.median(times[OURS])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            factor = "" if name == OURS else f"{median / ours:.2f}x"
            cells = [f"{1e3 * median:.1f}", f"{self.num_items / median:,.0f}", factor, escape(self.notes.get(name, ""))]
            result.add_row(name, *cells, style="bold" if name == OURS else None)
        for name in self.notes.keys() - times.keys():
            result.add_row(name, "", "", "", escape(self.notes[name]))
        return result

    def publish(
        self, times: Mapping[str, Sequence[float]], arguments: Mapping[str, Any], output: Path | None, console: Console
    ) -> Path:
        """Prints the table and writes the file of figures, whose path it returns."""
        console.print(self.table(times))
        device = torch.device("cpu")
        content = {
            "environment": environment.describe(device),
            "arguments": dict(arguments),
            "groups": [self.as_json(times)],
        }
        return results.write(output, self.task, content, device, console)

    def as_json(self, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """With the derived figures."""
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        return {
            "task": self.task,
            "shape": self.shape,
            "num_items": self.num_items,
            "unit": self.unit,
            "rows": {
                name: {
                    "median_s": medians[name],
                    "min_s": min(seconds),
                    "times_s": list(seconds),
                    f"{self.unit}_per_s": self.num_items / medians[name],
                    "note": self.notes.get(name, ""),
                }
                for name, seconds in times.items()
            },
            "targets": [
                {
                    "text": f"at least 1 times as fast as {name}",
                    "value": (value := medians[name] / medians[OURS]),
                    "is_met": value >= 1,
                }
                for name in self.baselines
                if name in medians
            ],
        }
