"""Two files of figures side by side: what became faster, what slower, beyond the noise and the state of the machine."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from megatron_orz import terminal
from megatron_orz.benchmark import results
from megatron_orz.benchmark.results import Measured

SMALLEST_CHANGE = 0.05
"""Of the median: less is not called a change."""


@dataclass(frozen=True)
class Arguments:
    """Compares two files of figures; exits with 1 where something of ours became slower beyond the noise.

    The other implementations of a group did not change: what they took longer is the machine's doing, and ours is
    allowed the same. A change counts if its runs are all slower, or all faster, than all runs before.
    """

    before: tyro.conf.Positional[Path]
    """A file of bench/results."""
    after: tyro.conf.Positional[Path]
    """The same benchmark at another commit."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One implementation, before and after."""

    before: Measured
    after: Measured
    drift: float
    """How many times as long the others of its group took; 1 where there are none."""

    @property
    def ratio(self) -> float:
        """How many times as fast it became, the drift taken out."""
        return statistics.median(self.before.times_s) / statistics.median(self._corrected)

    @property
    def verdict(self) -> str:
        """`slower` or `faster` beyond the noise, or neither."""
        before, after = self.before.times_s, self._corrected
        if min(after) > max(before) and self.ratio < 1 - SMALLEST_CHANGE:
            return "slower"
        if max(after) < min(before) and self.ratio > 1 + SMALLEST_CHANGE:
            return "faster"
        return ""

    @property
    def _corrected(self) -> Sequence[float]:
        return [seconds / self.drift for seconds in self.after.times_s]


def changes(before: Path, after: Path) -> list[Change]:
    """Of everything that both files have. Raises ValueError where they have nothing in common."""
    of_before, of_after = (
        {(m.task, m.shape, m.name): m for m in results.measured(results.read(path))} for path in (before, after)
    )
    common = [key for key in of_before if key in of_after]
    if not common:
        raise ValueError(
            f"{before} and {after} have no task, shape and implementation in common; compare two of a kind"
        )
    drifts: dict[tuple[str, str], list[float]] = {}
    for key in common:
        if not of_before[key].is_ours:
            ratio = statistics.median(of_after[key].times_s) / statistics.median(of_before[key].times_s)
            drifts.setdefault(key[:2], []).append(ratio)
    found = []
    for key in common:
        drift = statistics.median(drifts.get(key[:2], [1.0])) if of_before[key].is_ours else 1.0
        found.append(Change(before=of_before[key], after=of_after[key], drift=drift))
    return found


def run(arguments: Arguments, console: Console | None = None) -> list[Change]:
    """Prints a line for everything that both files have. Returns what of ours became slower."""
    console = console or Console()
    found = changes(arguments.before, arguments.after)
    for path in (arguments.before, arguments.after):
        e = results.read(path)["environment"]
        console.print(f"{path}: {e['device']}, torch {e['torch']}, commit {str(e['commit'])[:9]}, {e['time']}")
    columns = ("before s", "after s", "others took", "faster by")
    table = terminal.table(None, ["task", ""], columns, notes=True)
    for change in found:
        seconds = [f"{statistics.median(m.times_s):.4g}" for m in (change.before, change.after)]
        drift = f"{change.drift:.2f}x" if change.before.is_ours else ""
        verdict = change.verdict if change.before.is_ours else ""
        style = "red" if verdict == "slower" else None
        table.add_row(
            change.before.task, change.before.name, *seconds, drift, f"{change.ratio:.2f}x", verdict, style=style
        )
    console.print(table)
    return [change for change in found if change.before.is_ours and change.verdict == "slower"]


def main(arguments: Arguments, console: Console) -> None:
    """`run`, which ends the process with 1 where something became slower."""
    if slower := run(arguments, console):
        sys.exit(f"{len(slower)} of ours became slower")
