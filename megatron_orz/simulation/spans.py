"""When servers generated beside the trainer, from the timeline of a run ahead (`timeline.py`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_orz.timeline import TIMELINE_FILE, read_spans
from megatron_orz.types import Metrics

ROUNDING_S = 2e-6
"""The timeline has whole microseconds."""
COMPARED = ("sync", "generate", "infer")
"""Spans by whose seconds a step of the timeline is known among the rows of the metrics."""


@dataclass(kw_only=True)
class _Step:
    """Of the timeline."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of the trainer's spans."""
    alone_s: float | None = None


def seconds_alone(run_dir: Path, rows: Sequence[Metrics]) -> list[float | None]:
    """For each row, the seconds in which servers answered the requests of its step and nothing else.

    None where others were under way or weights were replaced meanwhile, or where the timeline lacks the step. Raises
    ValueError for a run without a timeline.
    """
    path = run_dir / TIMELINE_FILE
    if not path.exists():
        raise ValueError(
            f"{path} is missing, and nothing else says how long servers generated beside the trainer; put it back, or "
            "fit on another run"
        )
    steps, begin = _steps(path), 0
    found: list[float | None] = []
    for row in rows:
        # A resumed run repeats steps: those that are not among the rows are passed over.
        place = next((n for n in range(begin, len(steps)) if _is_of(steps[n], row)), None)
        found.append(None if place is None else steps[place].alone_s)
        begin = begin if place is None else place + 1
    return found


def _steps(path: Path) -> list[_Step]:
    steps = [_Step()]
    alone_s: float | None = None
    last_answer = sync_start = sync_end = 0.0
    for track, name, start, duration in read_spans(path):
        end = start + duration
        if track == "servers":
            # Written as the loop takes the responses, in the order of the steps.
            begin = start + ROUNDING_S
            is_alone = begin >= last_answer and (begin >= sync_end or end <= sync_start)
            alone_s, last_answer = duration if is_alone else None, end
            continue
        if name == "sync":
            sync_start, sync_end = start, end
            if "generate" in steps[-1].seconds:
                steps.append(_Step())
        steps[-1].seconds[name] += duration
        if name == "generate":
            steps[-1].alone_s, alone_s = alone_s, None
    return steps


def _is_of(step: _Step, row: Metrics) -> bool:
    return all(abs(step.seconds[name] - row.get(f"time/{name}_s", 0.0)) < ROUNDING_S for name in COMPARED)
