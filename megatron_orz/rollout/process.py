"""A server process that never outlives the trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_orz.closeable import Closeable

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_GRACE_S = 5.0
"""Between SIGTERM and SIGKILL to whatever is left of the command."""
_END_S = 10.0
"""How long the supervisor may take to end everything below it."""
_NUM_ERRORS, _NUM_LINES = 3, 8
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception): .+")  # "ValueError: ...", after whatever a logger puts before it


class SupervisedProcess(Closeable):
    """A command run under `supervisor.py`, its output at the end of a log file; a context manager that ends it.

    The supervisor has a session of its own: Ctrl-C in the terminal reaches the trainer, which then closes the server
    in order.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log_path: Path) -> None:
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid()), str(_GRACE_S), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The supervisor's process id; the command runs below it."""
        return self._supervisor.pid

    def exit_code(self, *, wait_s: float = 0.0) -> int | None:
        """The exit code of the command once all of it has ended within `wait_s` seconds, else None."""
        try:
            return self._supervisor.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        """The first exceptions this command logged, which are the likely reason for an end, then its last lines."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"it cannot be read: {error}"
        errors = dict.fromkeys(
            match[0] for line in lines if "WARNING" not in line and (match := _EXCEPTION.search(line))
        )
        return "\n".join([*list(errors)[:_NUM_ERRORS], "...", *lines[-_NUM_LINES:]])

    def close(self) -> None:
        """Ends the command and all its descendants; returns when they are gone."""
        self._supervisor.terminate()
        # The supervisor ends by itself soon after the grace: it sends SIGKILL until nothing is left.
        if self.exit_code(wait_s=_END_S) is None:
            self._supervisor.kill()
            self._supervisor.wait(_GRACE_S)
