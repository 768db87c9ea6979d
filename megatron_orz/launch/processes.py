"""The processes of one node: started, told of signals, waited for, and never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
END = signal.SIGUSR2
"""Asks an agent of servers to end them; meant for no other process."""

END_S = 60.0
"""How long the ranks of a node may take to end once one of them has failed: more than their watchdog gives them."""
_KILL_S = 15.0
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a group."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None
    """Where its output goes; None leaves it where this process's own goes."""


class ProcessGroup:
    """Processes that end together; a context manager that ends all of them.

    with Signals() as signals, ProcessGroup(processes) as group:
        code = group.wait(signals)
    """

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = list(processes)
        self._children: list[subprocess.Popen[bytes]] = []

    def wait(
        self, signals: Signals, *, timeout_s: float = float("inf"), is_over: Callable[[], bool] = lambda: False
    ) -> int:
        """The exit code of the first that failed, once all have ended; 0 when none did.

        Signals are passed on. When one has failed, or `is_over` says that it is over elsewhere, those that run get
        END_S to end by themselves. `is_over` is called ten times a second.

        Raises TimeoutError when some run for longer than `timeout_s`.
        """
        started = time.monotonic()
        failed: int | None = None
        deadline = float("inf")
        while any(child.poll() is None for child in self._children):
            signals.pass_on(self._children)
            failed = self._first_failed() if failed is None else failed
            if deadline == float("inf") and (failed is not None or is_over()):
                deadline = time.monotonic() + END_S
            if time.monotonic() > deadline:
                self._end()
            if time.monotonic() - started > timeout_s:
                running = [p.name for p, child in self._both() if child.poll() is None]
                raise TimeoutError(f"{', '.join(running)} did not end within {timeout_s:g} s")
            time.sleep(_POLL_S)
        failed = self._first_failed() if failed is None else failed
        return 0 if failed is None else _exit_code(self._children[failed])

    def describe_failure(self) -> str:
        """Which process failed, its exit code, and the last line it wrote."""
        failed = self._first_failed()
        assert failed is not None, "none has failed"
        process = self._processes[failed]
        code = _exit_code(self._children[failed])
        what = f"{process.name} ended with exit code {code}"
        if process.log is None:
            return what
        lines = process.log.read_text(errors="replace").split("\n")
        said = [line for line in lines if line.startswith("error")] or [line for line in lines if line.strip()]
        return f"{what} ({process.log}){': ' + said[-1] if said else ''}"

    def _first_failed(self) -> int | None:
        codes = [child.poll() for child in self._children]
        # A rank that a signal ended may be the victim of one that says more.
        order = sorted(range(len(codes)), key=lambda index: (codes[index] or 0) < 0)
        return next((index for index in order if codes[index]), None)

    def _both(self) -> list[tuple[Process, subprocess.Popen[bytes]]]:
        return list(zip(self._processes, self._children, strict=True))

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self._children:
                if child.poll() is None:
                    child.send_signal(number)
            deadline = time.monotonic() + _KILL_S
            while any(child.poll() is None for child in self._children) and time.monotonic() < deadline:
                time.sleep(_POLL_S)

    def __enter__(self) -> Self:
        try:
            for process in self._processes:
                self._children.append(_start(process))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()


@dataclass
class Signals:
    """Notes the signals that a scheduler or a user sends; a context manager."""

    received: list[int] = field(default_factory=list)
    _handlers: dict[int, Any] = field(default_factory=dict)
    _num_passed: int = 0

    def pass_on(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """Sends what has come since the last call to all children that run."""
        while self._num_passed < len(self.received):
            number = self.received[self._num_passed]
            for child in children:
                if number in FORWARDED and child.poll() is None:
                    child.send_signal(number)
            self._num_passed += 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._note) for number in (*FORWARDED, END)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _start(process: Process) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def before() -> None:
        """In the child: a session of its own (Ctrl-C reaches it through this process), and SIGTERM if this one dies."""
        os.setsid()
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    output: Any = None
    if process.log is not None:
        process.log.parent.mkdir(parents=True, exist_ok=True)
        output = process.log.open("ab")
    try:
        return subprocess.Popen(
            list(process.command),
            env=dict(process.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            preexec_fn=before,
        )
    finally:
        if output is not None:
            output.close()


def _exit_code(child: subprocess.Popen[bytes]) -> int:
    code = child.returncode
    return code if code >= 0 else 128 - code
