"""Runs the stages one after the other, each on what the ones before it left, and keeps the trail of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow

from megatron_orz.data.curation.collect import Columns, collect
from megatron_orz.data.curation.stage import Advance, Candidate, Stage, Verdict
from megatron_orz.data.curation.store import Store, digest, file_digest

COLLECT = "collect"
"""What stands for a stage in the trail of a row that cannot be read."""

# Texts of all rows together may exceed the 2 GiB that Arrow's plain strings hold.
_FIELDS = {"row": pyarrow.int64()} | dict.fromkeys(("file", "place", "text", "answer"), pyarrow.large_string())
"""Columns of the candidates on disk."""

Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Advance]]
"""(what, how much) -> the progress bar of a stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What became of one row, and why."""

    candidate: Candidate
    trail: tuple[tuple[str, Verdict], ...]
    """The verdict of every stage that saw the row, in order; the last one says whether it stays."""

    @property
    def reason(self) -> str | None:
        """Why it goes; None where it stays."""
        return self.trail[-1][1].reason

    @property
    def num_right(self) -> int | None:
        """Right responses of a model, where they were sampled."""
        return next((verdict.num_right for _, verdict in self.trail if verdict.num_right is not None), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCount:
    """What a stage did."""

    name: str
    num_in: int
    dropped: dict[str, int]
    """Reason -> rows."""

    @property
    def num_kept(self) -> int:
        return self.num_in - sum(self.dropped.values())


@dataclass(frozen=True, kw_only=True)
class Curation:
    """All rows with their decisions, and the counts of all stages."""

    decisions: Sequence[Decision]
    stages: Sequence[StageCount]

    @property
    def kept(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.reason is None]


def curate(
    files: Sequence[Path],
    stages: Sequence[Stage],
    *,
    columns: Columns,
    store: Store,
    progress: Progress,
    strict: bool = False,
) -> Curation:
    """Collects the rows of the files and lets every stage judge what is left of them.

    Every stage is read from the store when neither its identity nor anything before it has changed.
    Raises ValueError when a file is missing or of an unknown kind, and in strict mode when any row cannot be read.
    """
    key = digest(asdict(columns), [[str(file), file_digest(file)] for file in files])
    candidates, verdicts = _collect(files, columns, store, key, progress)
    trails: list[list[tuple[str, Verdict]]] = [[(COLLECT, verdict)] if verdict.reason else [] for verdict in verdicts]
    counts = [_count(COLLECT, verdicts)]
    if strict and counts[0].dropped:
        first = next(verdict.detail for verdict in verdicts if verdict.reason)
        num_bad = sum(counts[0].dropped.values())
        raise ValueError(f"{num_bad} of {len(verdicts)} rows cannot be used: {first}; or leave out --strict")

    left = [candidate for candidate, verdict in zip(candidates, verdicts, strict=True) if verdict.reason is None]
    for number, stage in enumerate(stages, start=1):
        key = digest(key, stage.name, stage.identity)
        verdicts = _judge(stage, left, store, f"{number}-{stage.name}", key, progress)
        counts.append(_count(stage.name, verdicts))
        for candidate, verdict in zip(left, verdicts, strict=True):
            trails[candidate.row].append((stage.name, verdict))
        left = [candidate for candidate, verdict in zip(left, verdicts, strict=True) if verdict.reason is None]
    decisions = [
        Decision(candidate=candidate, trail=tuple(trail)) for candidate, trail in zip(candidates, trails, strict=True)
    ]
    return Curation(decisions=decisions, stages=counts)


def _collect(
    files: Sequence[Path], columns: Columns, store: Store, key: str, progress: Progress
) -> tuple[list[Candidate], Sequence[Verdict]]:
    name = f"0-{COLLECT}"
    if (table := store.read(name, key)) is not None:
        columns_of = {column: table[column].to_pylist() for column in table.column_names}
        rows = zip(*(columns_of[field] for field in _FIELDS), strict=True)
        return [Candidate(**dict(zip(_FIELDS, row, strict=True))) for row in rows], _verdicts_of(columns_of)
    with progress(COLLECT, sum(file.stat().st_size for file in files)) as advance:
        candidates, verdicts = collect(files, columns, advance)
    arrays = {
        field: pyarrow.array([getattr(candidate, field) for candidate in candidates], kind)
        for field, kind in _FIELDS.items()
    }
    store.write(name, key, pyarrow.table(arrays | _verdict_columns(verdicts)))
    return candidates, verdicts


def _judge(
    stage: Stage, candidates: Sequence[Candidate], store: Store, name: str, key: str, progress: Progress
) -> Sequence[Verdict]:
    if (table := store.read(name, key)) is not None:
        return _verdicts_of({name: table[name].to_pylist() for name in table.column_names})
    with progress(stage.name, len(candidates) * stage.work) as advance:
        verdicts = stage.judge(candidates, advance)
    store.write(name, key, pyarrow.table(_verdict_columns(verdicts)))
    return verdicts


def _verdict_columns(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "reason": pyarrow.array([verdict.reason for verdict in verdicts], pyarrow.string()),
        "detail": pyarrow.array([verdict.detail for verdict in verdicts], pyarrow.large_string()),
        "num_right": pyarrow.array([verdict.num_right for verdict in verdicts], pyarrow.int32()),
    }


def _verdicts_of(columns: dict[str, list[Any]]) -> list[Verdict]:
    return list(map(Verdict, columns["reason"], columns["detail"], columns["num_right"]))


def _count(name: str, verdicts: Sequence[Verdict]) -> StageCount:
    dropped = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    return StageCount(name=name, num_in=len(verdicts), dropped=dict(sorted(dropped.items())))
