"""What an evaluation leaves behind: a line for every item, and what the run was.

run.json            model, data and sampling: what a continued evaluation must agree with
<benchmark>.jsonl   an `ItemRecord` a line, appended whole
scores.json         the scores, and the rows that were left out
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_orz.closeable import Closeable
from megatron_orz.json_file import read_json, write_json
from megatron_orz.types import AnswerKind, FinishReason

RUN_FILE = "run.json"
SCORES_FILE = "scores.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseRecord:
    """One response and its grade."""

    text: str
    num_tokens: int
    finish_reason: FinishReason
    reward: float
    is_correct: bool
    is_formatted: bool
    timed_out: bool
    extracted: str | None
    vote: int | None
    """Answers to one item with the same number are equivalent; None: no answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemRecord:
    """One item of a benchmark with all its responses."""

    item: str
    """A digest of the problem and its answer, the same in every run on it."""
    place: str
    """Where the problem stands: `aime2024.json: item 3`."""
    kind: AnswerKind
    problem: str
    answer: str
    responses: tuple[ResponseRecord, ...]

    @property
    def score(self) -> float:
        """The mean reward of its responses."""
        return sum(response.reward for response in self.responses) / len(self.responses)


class RecordFile(Closeable):
    """The records of one benchmark, which an interrupted evaluation goes on with. A context manager.

    Raises ValueError for a file that holds something else, or that another process has open here.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file, path)
            written = path.read_bytes()
            whole = written.rfind(b"\n") + 1
            self.records = {record.item: record for record in _parse(written[:whole], path)}
        except ValueError:
            self.close()
            raise
        self._file.truncate(whole)  # a machine that went down while writing leaves half a line

    def append(self, records: Sequence[ItemRecord]) -> None:
        """Adds the records that are not there yet, all or none; they are on disk when this returns."""
        new = [record for record in records if record.item not in self.records]
        data = b"".join(json.dumps(asdict(record)).encode() + b"\n" for record in new)
        size = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            raise
        self.records.update((record.item, record) for record in new)

    def close(self) -> None:
        """Closes the file, which holds every record already."""
        self._file.close()


def read_records(path: Path) -> list[ItemRecord]:
    """The whole lines of a record file. Raises ValueError for what is none."""
    data = path.read_bytes()
    return list(_parse(data[: data.rfind(b"\n") + 1], path))


def _lock(file: FileIO, path: Path) -> None:
    """Until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another process is evaluating into {path}; wait for it, or name another output directory"
        ) from error


def _parse(data: bytes, path: Path) -> Iterator[ItemRecord]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            fields = json.loads(line)
            responses = tuple(ResponseRecord(**response) for response in fields.pop("responses"))
            yield ItemRecord(**fields, responses=responses)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: line {number} is no record of an evaluation ({error}); name another output directory"
            ) from error


def claim(directory: Path, identity: Mapping[str, Any]) -> None:
    """Makes the directory that of the run with this identity, if it is not already.

    Raises ValueError, naming what differs, when the directory holds another run: their records must not be mixed.
    """
    path = directory / RUN_FILE
    identity = json.loads(json.dumps(identity, default=str))
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, identity)
        return
    held = read_identity(directory)
    different = [name for name in {**held, **identity} if held.get(name) != identity.get(name)]
    if different:
        listed = ", ".join(f"{name} ({held.get(name)!r}, not {identity.get(name)!r})" for name in different)
        raise ValueError(f"{directory} holds an evaluation with another {listed}; name another output directory")


def read_identity(directory: Path) -> dict[str, Any]:
    """What the directory's run is. Raises ValueError where it holds none."""
    path = directory / RUN_FILE
    try:
        identity = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; name the output directory of tools/evaluate.py run") from error
    if not isinstance(identity, dict) or not isinstance(identity.get("data"), dict):
        raise ValueError(f"{path} is of no evaluation; name the output directory of tools/evaluate.py run")
    return identity
