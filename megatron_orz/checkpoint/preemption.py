"""Ending a run in order when the scheduler asks for it: SIGTERM or SIGUSR1, a checkpoint, and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from megatron_orz.ranks import Ranks

REQUEUE = 75
"""Exit code of a run that was asked to stop and is not done: the same command goes on (EX_TEMPFAIL of sysexits.h)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Notes a signal of any rank, and stops all of them between two steps.

    with Preemption(ranks, grace_s=60, say=print) as preemption:
        for step in ...:
            ...
            if preemption.is_requested():  # collective
                save_and_wait()
                preemption.stop()

    A step that has not ended `grace_s` seconds after the signal is given up: the last checkpoint has to do. So is one
    that fails after the signal, which may have ended a server too.
    """

    def __init__(self, ranks: Ranks, *, grace_s: float, say: Callable[[str], None]) -> None:
        self._ranks = ranks
        self._grace_s = grace_s
        self._say = say
        self._received: str | None = None

    def is_requested(self) -> bool:
        """Whether any rank has got a signal. Collective."""
        return any(self._ranks.gather(self._received is not None))

    def stop(self) -> None:
        """Ends the process with the exit code for requeueing."""
        if self._ranks.rank == 0:
            self._say("stopped by a signal after a checkpoint; the same command goes on from it")
        sys.exit(REQUEUE)

    def __enter__(self) -> Self:
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._received is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._received is not None and isinstance(error, Exception):
            self._say(f"stopped by {self._received}; the step that was under way failed: {error}")
            sys.exit(REQUEUE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number).name
            _say_at_once(f"{self._received}: stopping at the end of the step, within {self._grace_s:g} s")
            self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        _say_at_once(
            f"the step did not end within {self._grace_s:g} s; the same command goes on from the last checkpoint"
        )
        sys.exit(REQUEUE)


def _say_at_once(message: str) -> None:
    """As a signal handler may: it can interrupt a `print`, which another one must not enter."""
    os.write(2, f"{message}\n".encode())
