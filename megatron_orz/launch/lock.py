"""One job at a time in a run directory; a second one is told who has it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_orz.json_file import write_json


@contextlib.contextmanager
def job_lock(state_dir: Path, *, attempt: str) -> Iterator[None]:
    """Holds the run directory that `state_dir` belongs to, until the end of the process at the latest.

    Raises ValueError with the host, the process and the attempt that hold it.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    owner = state_dir / "owner.json"
    with _acquire(state_dir):
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        content = {"host": socket.gethostname(), "process": os.getpid(), "attempt": attempt, "since": since}
        write_json(owner, content)
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


def check_unlocked(state_dir: Path) -> None:
    """Raises ValueError when a live job of this machine, or of one whose locks are seen here, has the directory."""
    if not (state_dir / ".lock").exists():
        return
    with _acquire(state_dir):
        pass


def describe_owner(state_dir: Path) -> str:
    """Who holds the run directory."""
    run_dir = state_dir.with_suffix("")
    try:
        owner = json.loads((state_dir / "owner.json").read_text())
        return (
            f"{run_dir} is in use by attempt {owner['attempt']} (process {owner['process']} on {owner['host']}, since "
            f"{owner['since']})"
        )
    except (OSError, ValueError, KeyError):
        return f"{run_dir} is in use by another job"


def _acquire(state_dir: Path) -> contextlib.AbstractContextManager[object]:
    try:
        return FileLock(state_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{describe_owner(state_dir)}; wait for it, cancel it, or set run_dir") from error
