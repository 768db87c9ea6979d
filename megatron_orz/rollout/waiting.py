"""Waits of a weight update: all of them share one deadline, and the first error ends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Thread
from typing import Any

from megatron_orz.rollout.servers import ServerError

_POLL_S = 0.02


class Deadline:
    """Of one weight update, or of connecting for it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Raises ServerError when there is no time left."""
        remaining_s = self._end - time.monotonic()
        if remaining_s <= 0:
            raise ServerError(
                f"a weight update took longer than fleet.update_timeout_s = {self._timeout_s:g} s; raise it"
            )
        return remaining_s


def in_background(call: Callable[[], None]) -> Future[None]:
    """Calls it on a thread that nothing waits for: without the other side it cannot end before its deadline."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            call()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, name="connect", daemon=True).start()
    return future


def first_error(futures: Sequence[Future[Any]], check: Callable[[], None] | None = None) -> None:
    """Waits for all of them; raises the first error without waiting for the others, whose own deadlines end them.

    check: called meanwhile; raises what ends the wait.
    """
    done, others = wait(futures, None if check is None else _POLL_S, return_when=FIRST_EXCEPTION)
    while check is not None and others and not any(future.exception() for future in done):
        check()
        done, others = wait(futures, _POLL_S, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done:
            future.result()
