"""What the stages of a curation have in common: candidates in, a verdict for each out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Advance: TypeAlias = Callable[[int], None]
"""Told how many more candidates are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A problem that may become training data."""

    row: int
    """Its number among the rows of all files."""
    file: str
    place: str
    """Where it stands: `train.jsonl: line 3`."""
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a stage says of one candidate."""

    reason: str | None
    """Why it goes, in one word that is counted; None where it stays."""
    detail: str = ""
    """What the stage found, for the audit trail, whether it goes or stays."""
    num_right: int | None = None
    """Right responses of a model, from the stage that samples them."""


STAYS = Verdict(None)

Judge: TypeAlias = Callable[[Sequence[Candidate], Advance], Sequence[Verdict]]
"""A verdict for each candidate, in order. Depends on the candidates and the stage's identity alone."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the curation."""

    name: str
    judge: Judge
    identity: Mapping[str, Any]
    """JSON of all that the verdicts depend on besides the candidates: settings, digests of further inputs."""
    work: int = 1
    """Units of progress for each candidate."""
