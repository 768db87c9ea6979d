"""What a curation leaves: the problems that stay, the decision on every row, the counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_orz.data.curation.pipeline import Curation, Decision
from megatron_orz.json_file import write_json
from megatron_orz.whole_file import whole_file

TRAIN, HARD, DECISIONS, SUMMARY = "train.jsonl", "hard.jsonl", "decisions.parquet", "summary.json"
_EXCERPT_CHARS = 2000


def write_outputs(curation: Curation, directory: Path, *, is_hard: Callable[[int | None], bool]) -> dict[str, Any]:
    """Writes all files, each whole or not at all, and returns the summary."""
    measured = [decision for decision in curation.decisions if decision.num_right is not None]
    write_problems(directory / TRAIN, curation.kept)
    if measured:
        write_problems(directory / HARD, [decision for decision in measured if is_hard(decision.num_right)])
    else:
        (directory / HARD).unlink(missing_ok=True)  # of an earlier run, on other data
    table = _table(curation.decisions)
    with whole_file(directory / DECISIONS) as file:
        parquet.write_table(table, file, compression="zstd")
    summary = summarise(curation)
    write_json(directory / SUMMARY, summary)
    return summary


def summarise(curation: Curation) -> dict[str, Any]:
    """JSON of the counts: in all, by stage and by file."""
    files: dict[str, dict[str, Any]] = {}
    for decision in curation.decisions:
        counts = files.setdefault(decision.candidate.file, {"rows": 0, "kept": 0, "dropped": {}})
        counts["rows"] += 1
        if decision.reason is None:
            counts["kept"] += 1
        else:
            counts["dropped"][decision.reason] = counts["dropped"].get(decision.reason, 0) + 1
    return {
        "rows": len(curation.decisions),
        "kept": len(curation.kept),
        "stages": {
            stage.name: {"rows": stage.num_in, "kept": stage.num_kept, "dropped": stage.dropped}
            for stage in curation.stages
        },
        "files": files,
    }


def write_problems(path: Path, decisions: Sequence[Decision]) -> None:
    """JSONL that training reads: `question`, `answer`; and where each comes from."""
    with whole_file(path) as file:
        for decision in decisions:
            candidate = decision.candidate
            row: dict[str, Any] = {"question": candidate.text, "answer": candidate.answer, "source": candidate.place}
            if decision.num_right is not None:
                row |= {"num_right": decision.num_right}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_decision(directory: Path, row: int) -> dict[str, Any]:
    """One row of the audit trail. Raises ValueError when there is none."""
    path = directory / DECISIONS
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name the --output of a finished curation")
    table = parquet.read_table(path)
    if not 0 <= row < table.num_rows:
        raise ValueError(f"row {row} is outside the {table.num_rows} rows of {path}; rows count from 0")
    decision: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    return decision


def _table(decisions: Sequence[Decision]) -> pyarrow.Table:
    """One row each: where it stands, its outcome, and what every stage said of it."""
    candidates = [decision.candidate for decision in decisions]
    return pyarrow.table(
        {
            "row": pyarrow.array([candidate.row for candidate in candidates], pyarrow.int64()),
            "place": pyarrow.array([candidate.place for candidate in candidates], pyarrow.string()),
            "outcome": pyarrow.array([decision.reason or "kept" for decision in decisions], pyarrow.string()),
            "trail": pyarrow.array([_lines(decision) for decision in decisions], pyarrow.list_(pyarrow.string())),
            "num_right": pyarrow.array([decision.num_right for decision in decisions], pyarrow.int32()),
            "question": pyarrow.array([c.text[:_EXCERPT_CHARS] for c in candidates], pyarrow.string()),
            "answer": pyarrow.array([c.answer[:_EXCERPT_CHARS] for c in candidates], pyarrow.string()),
        }
    )


def _lines(decision: Decision) -> list[str]:
    return [
        f"{stage}: {verdict.reason or 'stays'}" + (f" ({verdict.detail})" if verdict.detail else "")
        for stage, verdict in decision.trail
    ]
