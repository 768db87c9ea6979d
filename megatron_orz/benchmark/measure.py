"""Times of several functions, interleaved, and the memory one of them takes."""

import ctypes
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch

from megatron_orz.engine.high_water import forget_peak, held_bytes, peak_bytes

Run = Callable[[], Any]


def interleaved_times(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    num_repeats: int,
    min_s: float = 0.0,
    on_run: Run = lambda: None,
    is_warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of `num_repeats` runs of each function, after one run that does not count.

    The functions take turns, each round starting with another one, so that a machine that slows down for a while slows
    all of them down. Rounds go on for at least `min_s`, so that short functions run more often. `on_run` is called
    after each run. is_warm: every function has run already; no run is left out.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in count(int(is_warm)):
        if turn > num_repeats and time.perf_counter() - begin >= min_s:
            break
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds = _seconds(runs[name], device)
            if turn > 0:
                times[name].append(seconds)
            on_run()
    return times


def _seconds(run: Run, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_extra_bytes(run: Run, device: torch.device, *, forget: Run = lambda: None) -> int:
    """The most memory that exists at once during a run beyond what existed before; on a CPU, of the whole process.

    The function runs once before, so that libraries and compiled code are there already; `forget` then drops what it
    leaves behind.
    """
    run()
    forget()
    return peak_bytes_of_warm(run, device)


def peak_bytes_of_warm(run: Run, device: torch.device) -> int:
    """`peak_extra_bytes` of a function that has run before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # or a run may reuse what the one before has freed, and seem to need nothing
    forget_peak(device)
    before = held_bytes(device)
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(0, peak_bytes(device) - before)
