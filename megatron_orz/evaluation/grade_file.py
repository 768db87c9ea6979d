"""Grades generations that stand in a file: rows with `response` and `answer` in, the same rows with verdicts out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast, get_args

from megatron_orz.data.forms import check_reference
from megatron_orz.rewards.math_answer import Response
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import AnswerKind, FinishReason
from megatron_orz.whole_file import whole_file

CHUNK_ROWS = 1024

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GradeReport:
    """What became of the lines of a file."""

    num_read: int
    num_graded: int
    num_correct: int
    num_timed_out: int

    def __str__(self) -> str:
        share = f" ({100 * self.num_correct / self.num_graded:.1f} %)" if self.num_graded else ""
        return (
            f"{self.num_read} rows read, {self.num_graded} graded, {self.num_read - self.num_graded} left out; "
            f"{self.num_correct} correct{share}, {self.num_timed_out} timed out"
        )


def grade_file(
    source: Path,
    target: Path,
    verifier: AnswerVerifier,
    *,
    anywhere: bool = False,
    is_strict: bool = False,
    on_fault: Callable[[str], None],
    on_row: Callable[[int], None] = lambda num_bytes: None,
) -> GradeReport:
    """Adds `correct`, `extracted` and `timed_out` to every row, and writes them to `target`, whole or not at all.

    A row is an object with the text `response` and the text or number `answer`; `kind` and `finish_reason` say how it
    is graded and how it ended, `math` and `stop` by default. `correct` is about the answer, however the response ended.

    anywhere: take a box that stands outside of <answer> tags, where there are none.
    on_fault: called with a sentence for each line that is no such row; it is left out, or with is_strict an error.
    on_row: called with the bytes of every line that is done.
    """
    num_read = num_graded = num_correct = num_timed_out = 0
    if not source.is_file():
        raise ValueError(f"{source}: no such file; name a .jsonl file with response and answer")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as lines, whole_file(target) as output:
        numbered = enumerate(lines, start=1)
        while chunk := list(islice(numbered, CHUNK_ROWS)):
            rows: list[Row] = []
            for number, line in chunk:
                if not line.strip():
                    continue
                num_read += 1
                try:
                    rows.append(_parse(line))
                except ValueError as error:
                    fault = f"{source}: line {number}: {error}"
                    if is_strict:
                        raise ValueError(fault) from error
                    on_fault(fault)
            for row in _graded(rows, verifier, anywhere=anywhere):
                num_graded += 1
                num_correct += row["correct"]
                num_timed_out += row["timed_out"]
                output.write(json.dumps(row).encode() + b"\n")
            on_row(sum(len(line) for _, line in chunk))
    return GradeReport(num_read=num_read, num_graded=num_graded, num_correct=num_correct, num_timed_out=num_timed_out)


def _graded(rows: list[Row], verifier: AnswerVerifier, *, anywhere: bool) -> Iterator[Row]:
    kinds: list[AnswerKind] = [row.get("kind") or "math" for row in rows]
    responses: list[Response] = [
        (
            f"<answer>{row['response']}</answer>"
            if anywhere and "<answer>" not in row["response"]
            else row["response"],
            row.get("finish_reason") or "stop",
            str(row["answer"]),
        )
        for row in rows
    ]
    for row, grade in zip(rows, verifier.grade(kinds, responses), strict=True):
        yield {**row, "correct": grade.is_correct, "extracted": grade.extracted, "timed_out": grade.timed_out}


def _parse(line: bytes) -> Row:
    """The row on a line. Raises ValueError with the rule and the remedy."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON ({error}); correct it or remove it") from error
    if not isinstance(row, dict):
        raise ValueError('is not an object; write {"response": ..., "answer": ...}')
    for name in ("response", "answer"):
        if name not in row:
            raise ValueError(f"has no field {name!r}; add it")
    if not isinstance(row["response"], str):
        raise ValueError("the response is no text; correct or remove it")
    answer, kind, finish_reason = row["answer"], row.get("kind") or "math", row.get("finish_reason") or "stop"
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError("the answer is empty, or neither text nor a number; fill it in")
    for name, value, known in (
        ("kind", kind, get_args(AnswerKind)),
        ("finish_reason", finish_reason, get_args(FinishReason)),
    ):
        if value not in known:
            raise ValueError(f"the {name} {str(value)[:40]!r} is none of {', '.join(known)}; correct it")
    check_reference(cast(AnswerKind, kind), str(answer).strip())
    return row
