"""Candidates for tests: invented ones, and those of published data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_orz.data.curation.stage import Candidate, Verdict
from megatron_orz.data.reading import Problem, read_problems

SHARED = Path(__file__).parents[4] / "shared" / "data"


def published(name: str) -> list[Problem]:
    """The problems of a published data set; skips the test where it is not there."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not there")
    return list(read_problems(SHARED / name))


def candidates(problems: Sequence[Problem | tuple[str, str]]) -> list[Candidate]:
    """One candidate for each problem, or pair of text and answer."""
    pairs = [(problem.text, problem.answer) if isinstance(problem, Problem) else problem for problem in problems]
    return [
        Candidate(row=row, file="x.jsonl", place=f"x.jsonl: line {row + 1}", text=text, answer=answer)
        for row, (text, answer) in enumerate(pairs)
    ]


def texts(*problems: str) -> list[Candidate]:
    """Candidates whose answer is 1."""
    return candidates([(text, "1") for text in problems])


def reasons(verdicts: Sequence[Verdict]) -> list[str | None]:
    return [verdict.reason for verdict in verdicts]


def ignore(_: int) -> None:
    """Progress nobody looks at."""
