"""All rows of all files: candidates, and what is wrong with the rows that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_orz.data.curation.stage import STAYS, Advance, Candidate, Verdict
from megatron_orz.data.reading import RowError, read_rows


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where .jsonl, .parquet and .arrow files keep what; the recipe's .json forms have their own names."""

    problem: str = "question"
    answer: str = "answer"
    id: str = "id"
    """What the file calls the problem; must not occur twice in a file. Files may lack it."""


def collect(files: Sequence[Path], columns: Columns, advance: Advance) -> tuple[list[Candidate], list[Verdict]]:
    """A candidate and a verdict for each row, in order. advance: told the bytes of each file that is done.

    Reasons: those of `RowFault`, and `duplicated_id`. A row that cannot be read is a candidate without text.
    """
    candidates: list[Candidate] = []
    verdicts: list[Verdict] = []
    for file in files:
        places: dict[str, str] = {}  # id -> the first row that has it
        for row in read_rows(file, problem_column=columns.problem, answer_column=columns.answer, id_column=columns.id):
            text, answer, verdict = "", "", STAYS
            if isinstance(row, RowError):
                verdict = Verdict(row.fault, str(row))
            else:
                text, answer = row.text, row.answer
                if row.problem_id is not None:
                    first = places.setdefault(row.problem_id, row.place)
                    if first != row.place:
                        verdict = Verdict(
                            "duplicated_id", f"{row.place}: the id {row.problem_id!r} is that of {first}, too"
                        )
            number = len(candidates)
            candidates.append(Candidate(row=number, file=str(file), place=row.place, text=text, answer=answer))
            verdicts.append(verdict)
        advance(file.stat().st_size)
    return candidates, verdicts
