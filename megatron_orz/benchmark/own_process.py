"""A call in a process of its own, whose memory nothing else has touched, and which outlives neither call nor caller."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


def call_in_process(function: Callable[..., T], *arguments: object, timeout_s: float) -> T:
    """What the function returns. Raises what it raises, and TimeoutError where it takes longer."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        future = pool.submit(function, *arguments)
        try:
            return future.result(timeout_s)
        except BaseException:  # an interrupt too: the end of the block would wait for the function
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
