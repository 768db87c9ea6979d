"""Rows of data files: each one a problem, or what is wrong with it and where.

`read_rows` goes on after a bad row, for whoever counts and reports them; `read_problems` raises the first one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from megatron_orz.data.forms import COLUMNS, check_reference, find_form
from megatron_orz.types import AnswerKind

RowFault: TypeAlias = Literal["malformed", "encoding", "missing_column", "empty", "wrong_type"]
SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
_SHOWN_CHARS = 200
"""What a message shows of a value."""
_BOOKKEEPING = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One row of a data file: the question as it stands there, and the reference answer."""

    text: str
    answer: str
    """A value, a letter, or for a program its tests as `CodeTests` writes them."""
    place: str
    """Where it stands: `train.jsonl: line 3`."""
    problem_id: str | None = None
    """What the file calls it, where it has a column for that."""
    kind: AnswerKind = "math"


class RowError(ValueError):
    """Why a row, or a whole file, is no problem. The message names the place, the rule and the remedy."""

    def __init__(self, fault: RowFault, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}")
        self.fault = fault
        self.place = place


def read_problems(path: Path, *, problem_column: str = "question", answer_column: str = "answer") -> Iterator[Problem]:
    """The problems of a file, row by row, in the forms that `read_rows` knows.

    Raises ValueError naming the file, the row, the rule and the remedy.
    """
    is_empty = True
    for row in read_rows(path, problem_column=problem_column, answer_column=answer_column):
        if isinstance(row, RowError):
            raise row
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"{path}: holds no problems; remove it from the list of files, or fill it")


def read_rows(
    path: Path,
    *,
    problem_column: str = "question",
    answer_column: str = "answer",
    id_column: str | None = None,
    option_seed: int = 0,
) -> Iterator[Problem | RowError]:
    """Every row of a file, good or bad, in order. What keeps the rest of a file from being read is its last row.

    .json             the recipe's training form, `[{"from": "human", "value": problem},
                      {"from": "assistant", "ground_truth": {"value": answer}}]` per item, or its evaluation
                      form, `{"prompt": [{"from": "user", "value": problem}], "final_answer": answer}`
    .jsonl            an object per line with the two columns; of an answer in GSM8K's style only what follows `####`
    .parquet, .arrow  a table with the two columns; the latter is what `datasets` saves

    Rows of .jsonl and tables may also be in one of the forms of `forms.py`, which are known by their columns. A column
    `kind` says how other rows are graded.

    id_column: read where the rows have it.
    option_seed: shuffles the options of forms whose right one always comes first.
    Raises ValueError when there is no such file, or it is of another kind.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check data.train and evaluation.data")
    try:
        match path.suffix:
            case ".json":
                rows = _read_json(path)
            case ".jsonl":
                rows = read_jsonl(path)
            case ".parquet" | ".arrow":
                rows = _read_table(path, (problem_column, answer_column), id_column)
            case _:
                raise _unknown_kind(path)
        for place, row in rows:
            if isinstance(row, RowError):
                yield row
                continue
            try:
                kind: AnswerKind = "math"
                if path.suffix == ".json":
                    problem, answer = _recipe_fields(row, place)
                elif (formed := _formed_fields(row, place, option_seed)) is not None:
                    problem, answer, kind = formed
                else:
                    problem, answer = (_column(row, column, place) for column in (problem_column, answer_column))
                yield _problem(row, place, problem, answer, kind, id_column)
            except RowError as error:
                yield error
    except RowError as error:
        yield error


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a directory, such as one that `datasets` saved to disk.

    Raises ValueError where there are none, and for a file of another kind.
    """
    if path.is_file() and path.suffix in SUFFIXES:
        return [path]
    if path.is_file():
        raise _unknown_kind(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or directory; name one that exists")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES and file.name not in _BOOKKEEPING and not file.name.startswith((".", "cache-"))
    )
    if not files:
        raise ValueError(f"{path}: holds no data files ({', '.join(SUFFIXES)}); name a directory that does")
    return files


def _unknown_kind(path: Path) -> ValueError:
    return ValueError(f"{path}: unknown kind of file {path.suffix!r}; use {', '.join(SUFFIXES)}")


def _problem(row: Any, place: str, problem: Any, answer: Any, kind: AnswerKind, id_column: str | None) -> Problem:
    problem_id = row.get(id_column) if id_column is not None and isinstance(row, dict) else None
    named = row.get("kind") if isinstance(row, dict) else None
    if named is not None and (named := text_of(named, "kind", place)) not in get_args(AnswerKind):
        rule = f"the kind {named[:_SHOWN_CHARS]!r} is none of {', '.join(get_args(AnswerKind))}; correct or remove it"
        raise RowError("wrong_type", place, rule)
    kind = named or kind
    answer = text_of(answer, "answer", place) if kind == "code" else _answer(answer, place)
    try:
        check_reference(kind, answer)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong_type", place, f"{error}; correct or remove it") from error
    return Problem(
        text=text_of(problem, "problem", place),
        answer=answer,
        place=place,
        problem_id=None if problem_id is None else text_of(problem_id, "id", place),
        kind=kind,
    )


def _formed_fields(row: Any, place: str, option_seed: int) -> tuple[str, str, AnswerKind] | None:
    """The fields of a row in one of the registered forms; None for a row in none of them."""
    form = find_form(row) if isinstance(row, dict) else None
    if form is None:
        return None
    decoded = {
        column: _decode(value, f"{place}: the {column}") if isinstance(value, bytes) else value
        for column, value in row.items()
    }
    try:
        return form.read(decoded, option_seed)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong_type", place, f"is no {form.name} problem: {error}; correct or remove it") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    # A byte that is not UTF-8 becomes a lone surrogate, which spoils the item it stands in and no other.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if not text.strip():
        return
    items = _parse_json(text, str(path))
    if not isinstance(items, list):
        rule = f"holds a JSON {type(items).__name__}, not a list of problems; wrap them in [...]"
        raise RowError("malformed", str(path), rule)
    for number, item in enumerate(items, start=1):
        yield f"{path}: item {number}", item


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line that is not blank; a RowError in place of a value that cannot be read."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}: line {number}"
            try:
                if text := _decode(line, place).strip():
                    yield place, _parse_json(text, place)
            except RowError as error:
                yield place, error


def _read_table(path: Path, columns: Sequence[str], id_column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    is_parquet = path.suffix == ".parquet"
    remedy = "write it with pyarrow or pandas" if is_parquet else "save it with datasets' save_to_disk"
    num_rows = 0
    try:
        # Memory maps would raise a bus error, not an exception, where a file is cut short.
        file = parquet.ParquetFile(path) if is_parquet else pyarrow.ipc.open_stream(path.read_bytes())
        present = (file.schema_arrow if is_parquet else file.schema).names
        names = [column for column in (*COLUMNS, "kind") if column in present]
        if find_form(dict.fromkeys(names)) is None:
            for column in columns:
                if column not in present:
                    raise _missing_column(column, present, str(path))
        also = [*columns, *([id_column] if id_column is not None else [])]
        names = list(dict.fromkeys([*names, *(name for name in also if name in present)]))
        for batch in file.iter_batches(columns=names) if is_parquet else file:
            for row in zip(*(_values(batch.column(name)) for name in names), strict=True):
                num_rows += 1
                yield f"{path}: row {num_rows}", dict(zip(names, row, strict=True))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind, after = path.suffix[1:], f", readable up to row {num_rows}" if num_rows else ""
        # Arrow's messages are lists of causes, one a line.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RowError("malformed", str(path), f"not a {kind} file{after} ({cause}); {remedy}") from error


def _values(column: Any) -> list[Any]:
    """The values of a column; text as bytes, because files may hold what is not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type):
        column = column.view(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.view(pyarrow.large_binary())
    # Arrow takes offsets from a file as they are, and would follow damaged ones anywhere.
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return values


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"byte {error.start} ({raw[error.start]:#x}) is not UTF-8; save it as UTF-8 (iconv -f latin1 -t utf-8)"
        raise RowError("encoding", place, rule) from error


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    # Besides what is no JSON: integers of thousands of digits, and brackets nested as deep.
    except (ValueError, RecursionError) as error:
        raise RowError("malformed", place, f"malformed JSON ({error}); correct it or remove it") from error


def _recipe_fields(item: Any, place: str) -> tuple[Any, Any]:
    match item:
        case [{"from": "human", "value": problem}, {"from": "assistant", "ground_truth": {"value": answer}}, *_]:
            return problem, answer
        case {"prompt": [{"from": "user", "value": problem}, *_], "final_answer": answer}:
            return problem, answer
    raise RowError(
        "missing_column",
        place,
        "is in neither of the recipe's forms; write it as "
        '[{"from": "human", "value": problem}, {"from": "assistant", "ground_truth": {"value": answer}}] or '
        '{"prompt": [{"from": "user", "value": problem}], "final_answer": answer}, '
        "or use .jsonl with data.problem_column and data.answer_column",
    )


def _column(row: Any, column: str, place: str) -> Any:
    if not isinstance(row, dict):
        raise RowError("wrong_type", place, f'is not an object with named columns; write {{"{column}": ...}}')
    if column not in row:
        raise _missing_column(column, list(row), place)
    return row[column]


def _missing_column(column: str, present: Sequence[str], place: str) -> RowError:
    listed = ", ".join(map(repr, present))[:_SHOWN_CHARS] or "none"
    rule = f"has no column {column!r}, only {listed}; set data.problem_column and data.answer_column"
    return RowError("missing_column", place, rule)


def text_of(value: Any, name: str, place: str) -> str:
    """The value as text that can be written as UTF-8, a number included. Raises RowError where there is none in it."""
    if isinstance(value, bytes):
        value = _decode(value, f"{place}: the {name}")
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str):
        rule = f"the {name} {repr(value)[:_SHOWN_CHARS]} is neither text nor a number; correct or remove it"
        raise RowError("wrong_type", place, rule)
    if not value.strip():
        raise RowError("empty", place, f"the {name} is empty; fill it in or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        rule = f"the {name} holds a lone surrogate at character {error.start}, so it is not UTF-8; save it as UTF-8"
        raise RowError("encoding", place, rule) from error
    return value


def _answer(value: Any, place: str) -> str:
    _, gsm8k, final = text_of(value, "answer", place).rpartition("####")
    return text_of(final.replace(",", "") if gsm8k else final, "answer", place).strip()
