"""How the nodes of a job find each other: small files in a directory that all of them see.

Every start of a job has a directory of its own, so that a file that an earlier start left behind is never taken for one
of this start. A node that cannot go on publishes the reason, and those who wait for it end at once with that sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_POLL_S = 0.2


class NodeError(RuntimeError):
    """Another node cannot go on, or did not come in time."""


class Notices:
    """The notices of one start of a job, in `<state_dir>/notices/<attempt>`."""

    def __init__(self, state_dir: Path, attempt: str) -> None:
        self._directory = state_dir / "notices" / attempt

    def publish(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a notice, whole or not at all. Raises ValueError when it is there already."""
        self._write(name, {"content": dict(content)})

    def publish_failure(self, name: str, reason: str) -> None:
        """Says why a notice will not come, unless it has come."""
        try:
            self._write(name, {"error": reason})
        except ValueError:
            return

    def wait(
        self, names: Sequence[str], *, timeout_s: float, check: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """The contents of these notices, once all of them are there.

        check: called a few times a second; raises to end the waiting.

        Raises NodeError when one of them is a failure, and when one has not come within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        found: dict[str, dict[str, Any]] = {}
        while True:
            for name in names:
                if name not in found and (notice := self._read(name)) is not None:
                    if "error" in notice:
                        raise NodeError(notice["error"])
                    found[name] = notice["content"]
            if missing := [name for name in names if name not in found]:
                check()
                if time.monotonic() > deadline:
                    raise NodeError(self._describe(missing, len(names), timeout_s))
                time.sleep(_POLL_S)
            else:
                return [found[name] for name in names]

    def peek(self, name: str) -> dict[str, Any] | None:
        """The content of a notice if it is there, and is no failure."""
        notice = self._read(name)
        return None if notice is None else notice.get("content")

    def remove_others(self) -> None:
        """Removes the notices of earlier starts. Called by the holder of the job's lock."""
        for directory in self._directory.parent.glob("*"):
            if directory != self._directory:
                shutil.rmtree(directory, ignore_errors=True)

    def _describe(self, missing: Sequence[str], num_names: int, timeout_s: float) -> str:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        return (
            f"{len(missing)} of {num_names} did not come within {timeout_s:g} s: {shown} in {self._directory}; look "
            "into their logs, and see that all nodes share this directory"
        )

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            notice: dict[str, Any] = json.loads((self._directory / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return notice

    def _write(self, name: str, notice: Mapping[str, Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{name}.json"
        unfinished = self._directory / f".{name}.{os.getpid()}"
        unfinished.write_text(json.dumps(notice) + "\n")
        try:
            os.link(unfinished, path)
        except FileExistsError as error:
            raise ValueError(
                f"{path} is there already: a stale file of an earlier start, or of a second agent for the same node; "
                "see that nothing runs, and remove its directory"
            ) from error
        finally:
            unfinished.unlink()
