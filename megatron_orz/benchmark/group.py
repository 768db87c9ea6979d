"""What a benchmark measures side by side, and what it finds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_orz.benchmark.measure import Run

OURS = "megatron_orz"


@dataclass(frozen=True)
class Row:
    """An implementation of what its group computes."""

    run: Run
    errors: Callable[[], dict[str, float]]
    """What it is off by from float64, on a part of the problem."""
    note: str = ""
    """Where it computes less, or something else."""
    forget: Run = lambda: None
    """Drops what a run leaves behind: gradients."""


@dataclass(frozen=True)
class Finding:
    """What was measured of a row, or why nothing was."""

    times_s: Sequence[float] = ()
    extra_bytes: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def min_s(self) -> float | None:
        return min(self.times_s, default=None)

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.times_s) if self.times_s else None


@dataclass(frozen=True)
class Findings:
    """Of a group: its rows, and the least time that the hardware needs, [s]; None if that is not known."""

    rows: Mapping[str, Finding]
    floor_s: float | None = None


@dataclass(frozen=True)
class Target:
    """A claim about a group."""

    text: str
    value: Callable[[Findings], float | None]
    """None if it cannot be told, because something was not measured."""
    at_least: float = float("-inf")
    at_most: float = float("inf")

    def is_met(self, findings: Findings) -> bool | None:
        value = self.value(findings)
        return None if value is None else self.at_least <= value <= self.at_most


@dataclass(frozen=True)
class Group:
    """One task at one shape."""

    task: str
    shape: str
    rows: Mapping[str, Row]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Implementations that cannot run here, and why."""
    floor: Callable[[], Mapping[str, Run]] = dict
    """What the hardware cannot avoid; built where it is timed, because it holds memory."""
    floor_counts: Mapping[str, int] = field(default_factory=dict)
    """How often the task does each."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Errors above these mean that a row computes something else; it is not timed."""
    our_limits: Mapping[str, float] = field(default_factory=dict)
    """The same for our own rows, which must keep what their documentation says."""
    targets: Sequence[Target] = ()


def faster_than(other: str, factor: float) -> Target:
    def ratio(findings: Findings) -> float | None:
        ours, theirs = findings.rows[OURS].min_s, findings.rows.get(other, Finding()).min_s
        return theirs / ours if ours and theirs else None

    return Target(f"at least {factor:g} times as fast as {other}", ratio, at_least=factor)


def smaller_than(other: str, factor: float) -> Target:
    def ratio(findings: Findings) -> float | None:
        ours, theirs = findings.rows[OURS].extra_bytes, findings.rows.get(other, Finding()).extra_bytes
        return ours / theirs if ours is not None and theirs else None

    return Target(f"at most {1 / factor:g} of the memory of {other}", ratio, at_most=1 / factor)


def share_of_floor(share: float) -> Target:
    def value(findings: Findings) -> float | None:
        ours = findings.rows[OURS].min_s
        return findings.floor_s / ours if ours and findings.floor_s else None

    return Target(f"at least {share:.0%} of the floor", value, at_least=share)


def memory_at_most(num_bytes: int, text: str) -> Target:
    return Target(f"{text}, bytes", lambda findings: findings.rows[OURS].extra_bytes, at_most=num_bytes)


def error_at_most(name: str, limit: float) -> Target:
    return Target(
        f"{name} error at most {limit:g}", lambda findings: findings.rows[OURS].errors.get(name), at_most=limit
    )
