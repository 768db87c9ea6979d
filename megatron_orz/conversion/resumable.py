"""A directory of large files, written one after the other: whole or not at all, and continued where it was interrupted.

The files grow in a hidden directory beside the target, which becomes the target when all are there. A journal in it
names the finished files; whoever is asked for the same output again goes on after the last of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from filelock import FileLock, Timeout

from megatron_orz.json_file import read_json, write_json

JOURNAL = "conversion.json"

Advance: TypeAlias = Callable[[int], None]
"""Told the bytes of every piece that is done."""


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file to write."""

    name: str
    num_bytes: int
    """Of its tensors."""
    write: Callable[[BinaryIO, Advance], Any]
    """Writes the content; what it returns is JSON, and is handed to the finish of the whole, resumed or not."""


def write_directory(
    target: Path,
    files: Sequence[OutputFile],
    *,
    identity: Mapping[str, Any],
    finish: Callable[[Path, Mapping[str, Any]], None],
    advance: Advance,
) -> bool:
    """Writes `files` and calls `finish(directory, {file: what its write returned})` before the directory is moved.

    identity: JSON that says what is written, of which source; an interrupted directory is continued if it is equal.
    Returns False when the target is complete already.

    Raises ValueError when the target holds something else, another process is at it, or the disk is too small, and
    RuntimeError when writing fails; nothing is left of the output then.
    """
    if _is_complete(target, identity):
        return False
    unfinished = target.with_name(f".{target.name}.unfinished")
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=0):
            try:
                if _is_complete(target, identity):  # another process has finished it in between
                    return False
                _write(unfinished, files, identity, finish, advance)
                unfinished.rename(target)
            finally:
                os.unlink(lock.lock_file)
    except Timeout as error:
        raise ValueError(f"another process is writing {target}; wait for it, or name another --output") from error
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RuntimeError(f"cannot write {target}: {error}; free some space or name another --output") from error
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return True


def _is_complete(target: Path, identity: Mapping[str, Any]) -> bool:
    """Raises ValueError when the target holds something else."""
    if not target.exists():
        return False
    if _journal(target).get("identity") != identity:
        raise ValueError(f"{target} exists and is not this output; remove it, or name another --output")
    return True


def _write(
    directory: Path,
    files: Sequence[OutputFile],
    identity: Mapping[str, Any],
    finish: Callable[[Path, Mapping[str, Any]], None],
    advance: Advance,
) -> None:
    journal = _journal(directory)
    if journal.get("identity") != identity or "finished" not in journal:
        shutil.rmtree(directory, ignore_errors=True)
        journal = {"identity": identity, "finished": {}}
        directory.mkdir()
    finished: dict[str, Any] = journal["finished"]
    missing = [file for file in files if file.name not in finished]
    _check_space(directory, sum(file.num_bytes for file in missing))
    advance(sum(file.num_bytes for file in files if file.name in finished))
    for file in missing:
        with open(directory / file.name, "wb", buffering=0) as stream:
            finished[file.name] = file.write(stream, advance)
            os.fsync(stream.fileno())
        write_json(directory / JOURNAL, journal)
    finish(directory, finished)
    write_json(directory / JOURNAL, {"identity": identity})


def _journal(directory: Path) -> dict[str, Any]:
    """Empty where there is none, or one that says nothing."""
    try:
        journal = read_json(directory / JOURNAL)
    except ValueError:
        return {}
    return journal if isinstance(journal, dict) and isinstance(journal.get("finished", {}), dict) else {}


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise ValueError(
            f"{directory.parent} has {free / 2**30:.1f} GiB free, but the output still needs "
            f"{num_bytes / 2**30:.1f} GiB; free some space or name another --output"
        )
