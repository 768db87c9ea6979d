"""All committed figures as one Markdown table: what README and docs/benchmark.md show."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from megatron_orz.benchmark import results
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.results import Measured

_FIRST = ("end-to-end", "train", "infer", "sync", "kernels")
"""Subjects of files in the order of the table; others follow."""
HEADER = ("hardware", "work", "ours", "baseline", "ratio", "command", "commit")


@dataclass(frozen=True)
class Arguments:
    """Prints a Markdown table of the time ours took, and the memory, beside the baselines and the fastest other."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of figures; by default all of bench/results."""


def run(arguments: Arguments, console: Console | None = None) -> None:
    """Prints the table, unwrapped."""
    console = console or Console()
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for path in arguments.files or sorted(results.FOLDER.glob("*.json"), key=_place):
        lines += rows(path)
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def rows(path: Path) -> Iterator[str]:
    """A line for each task and baseline of a file."""
    content = results.read(path)
    environment = content["environment"]
    groups: dict[tuple[str, str], dict[str, Measured]] = {}
    for row in results.measured(content):
        groups.setdefault((row.task, row.shape), {})[row.name] = row
    for (task, shape), of_name in groups.items():
        for ours, baseline in _pairs(of_name):
            ratio = _median(baseline) / _median(ours)
            yield _line(
                [
                    environment["device"],
                    f"{task}, {shape}{ours.name.removeprefix(OURS)}",
                    _show(ours),
                    f"{baseline.name}: {_show(baseline)}",
                    f"{ratio:.2f}",
                    f"`{environment['command'].removeprefix('python ')}`",
                    str(environment["commit"])[:9],
                ]
            )


def _pairs(of_name: dict[str, Measured]) -> Iterator[tuple[Measured, Measured]]:
    """Ours with each implementation that a target compares its speed with, and with the fastest other;
    what it does with more parts, beside it without them; the fastest transport with plain copies."""
    if OURS in of_name:
        ours = of_name[OURS]
        matches = (re.search(r"times as fast as (.+)$", target["text"]) for target in ours.targets)
        shown = {match[1] for match in matches if match}
        others = [row for row in of_name.values() if not row.is_ours]
        fastest = min(others, key=_median, default=None)
        for other in others:
            if other.name in shown or other is fastest:
                yield ours, other
        for name, more in of_name.items():
            if name.startswith(f"{OURS}, with "):
                yield more, ours
    elif "memcpy" in of_name:
        transports = [row for row in of_name.values() if row.is_ours]
        yield min(transports, key=_median), of_name["memcpy"]


def _place(path: Path) -> tuple[list[bool], str]:
    return [f"-{subject}" not in path.stem for subject in _FIRST], path.stem


def _median(row: Measured) -> float:
    return statistics.median(row.times_s)


def _show(row: Measured) -> str:
    for figure in ("samples_per_s", "tokens_per_s", "responses_per_s"):
        if figure in row.figures:
            return f"{row.figures[figure]:,.0f} {figure.replace('_per_', '/')}"
    milliseconds = 1e3 * _median(row)
    time = f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.3g} s"
    extra_bytes = row.figures.get("extra_bytes")
    return f"{time}, {extra_bytes / 2**20:,.0f} MiB" if extra_bytes else time


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
