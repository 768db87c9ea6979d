"""Runs ranks of which one misbehaves, most of them in pairs, and tells how each of them ended.

    python -m tests.faults.ranks DIRECTORY FAULT...
    torchrun --nproc-per-node 2 -m tests.faults.ranks DIRECTORY FAULT

Each fault gets one or two processes with a gloo group and a watchdog, all at once: forked from this one, which has
imported torch and done nothing with it. Prints JSON: fault -> [{exit_code, seconds, stderr} of each rank]. Seconds are
those since the fault. What has not ended after DEADLINE_S, or LATE_S after the one that waits for a stopped process, is
killed; its exit code is null.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_orz import watchdog
from megatron_orz.command_line import plain_errors
from megatron_orz.rollout.servers import free_port
from megatron_orz.watchdog import Watchdog

HANG_TIMEOUT_S = 10.0
GRACE_S = 4.0
PATIENT_S = 60.0
"""In place of both where nothing hangs, or where a rank ends by itself: however long a busy machine takes."""
DEADLINE_S = 150.0
ORDERLY_EXIT_CODE = 75
LATE_S = 8.0


class Ranks:
    """The ranks of one fault."""

    def __init__(self, fault: str, directory: Path) -> None:
        self.directory = directory / fault
        self.directory.mkdir()
        self.ended: dict[int, dict[str, Any]] = {}
        self.deadline = time.monotonic() + DEADLINE_S
        port = free_port()
        self.pids = [self._fork(fault, rank, port) for rank in range(1 if fault in ALONE else 2)]

    def _fork(self, fault: str, rank: int, port: int) -> int:
        if pid := os.fork():
            return pid
        stderr = os.open(self.directory / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(stderr, 2)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": "1" if fault in ALONE else "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        watchdog.GRACE_S = GRACE_S if (fault, rank) in ENDED_BY_THE_WATCHDOG else PATIENT_S
        code = 1
        try:
            run(fault, rank, self.directory)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    def collect(self) -> bool:
        """Whether all have ended."""
        is_late = time.monotonic() > self.deadline
        for rank, pid in enumerate(self.pids):
            if rank in self.ended:
                continue
            if is_late:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if is_late else os.WNOHANG)
            if ended:
                if self.directory.name == is_stopped.__name__:
                    self.deadline = min(self.deadline, time.monotonic() + LATE_S)
                fault = self.directory / "fault"
                self.ended[rank] = {
                    "exit_code": None if is_late else os.waitstatus_to_exitcode(status),
                    "seconds": time.time() - fault.stat().st_mtime if fault.exists() else 0.0,
                    "stderr": (self.directory / f"stderr-{rank}").read_text(),
                }
        return len(self.ended) == len(self.pids)


def run(fault: str, rank: int, directory: Path) -> None:
    """What a rank does: a few steps together, then the fault."""
    torch.set_num_threads(1)
    with (
        plain_errors(),
        Watchdog(directory, timeout_s=HANG_TIMEOUT_S if fault in HANGING else PATIENT_S) as dog,
        process_group(),
        dog.watching_peers(),
    ):
        for _ in range(3):
            dog.progress("exchange")
            dist.all_reduce(torch.ones(1))
        while dog._peers is not None and not dog._peers._watched:
            time.sleep(0.1)
        wait_for_each_other()  # the watchdogs know each other
        dog.progress("the fault")
        FAULTS[fault](rank, directory)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_each_other() -> None:
    dist.all_reduce(torch.ones(1))


def work() -> None:
    """Something long in which no other rank takes part, which moves in the eyes of nobody."""
    time.sleep(3600)


def now(directory: Path) -> None:
    (directory / "fault").touch()


def raises(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        raise KeyError("the first cause")
    wait_for_each_other()


def raises_while_the_other_works(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        raise OSError("the first cause")
    work()


def refuses_its_input(rank: int, directory: Path) -> None:
    now(directory)
    raise ValueError("the first cause")


def one_refuses_its_input(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        raise ValueError("the first cause")
    wait_for_each_other()


def is_killed(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_each_other()


def is_killed_while_the_other_works(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        os.kill(os.getpid(), signal.SIGKILL)
    work()


def rank_0_is_killed_with_the_store(rank: int, directory: Path) -> None:
    if rank == 0:
        now(directory)
        os.kill(os.getpid(), signal.SIGKILL)
    work()


def is_stopped(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_each_other()


def waits_for_a_lock(rank: int, directory: Path) -> None:
    if rank == 1:
        now(directory)
        lock_that_nobody_releases = threading.Lock()
        lock_that_nobody_releases.acquire()
        lock_that_nobody_releases.acquire()
    wait_for_each_other()


def ends_early(rank: int, directory: Path) -> None:
    wait_for_each_other()
    if rank == 0:
        threading.Timer(3.0, now, [directory]).start()


def exits_in_order(rank: int, directory: Path) -> None:
    """All ranks agree to end with an exit code; rank 0 has something to close before."""
    wait_for_each_other()
    now(directory)
    if rank == 0:
        time.sleep(3.0)
    sys.exit(ORDERLY_EXIT_CODE)


def is_suspended_for_long(rank: int, directory: Path) -> None:
    """Both ranks are stopped for longer than the deadline, and go on: Ctrl-Z and fg."""
    now(directory)
    if os.fork() == 0:
        time.sleep(1.5 * HANG_TIMEOUT_S)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_each_other()


def waits_alone(rank: int, directory: Path) -> None:
    now(directory)
    threading.Event().wait()


def keeps_the_interpreter(rank: int, directory: Path) -> None:
    """A call into C that does not give the interpreter's lock back, so that no other thread of Python runs."""
    now(directory)
    ctypes.PyDLL(None).sleep(3600)


ALONE = ("waits_alone", "keeps_the_interpreter")
HANGING = ("is_stopped", "waits_for_a_lock", "is_suspended_for_long", *ALONE)
ENDED_BY_THE_WATCHDOG = {
    *(("raises_while_the_other_works", 0), ("is_killed_while_the_other_works", 0)),
    *(("rank_0_is_killed_with_the_store", 1), ("is_stopped", 0)),
    *(("waits_for_a_lock", 0), ("waits_for_a_lock", 1)),
    *((fault, 0) for fault in ALONE),
}
"""Ranks that would never end by themselves."""

FAULTS = {
    function.__name__: function
    for function in (
        *(raises, raises_while_the_other_works, refuses_its_input, one_refuses_its_input, is_killed),
        *(is_killed_while_the_other_works, rank_0_is_killed_with_the_store, is_stopped, waits_for_a_lock),
        *(ends_early, exits_in_order, is_suspended_for_long, waits_alone, keeps_the_interpreter),
    )
}


def main(directory: Path, faults: list[str]) -> None:
    pairs = {fault: Ranks(fault, directory) for fault in faults}
    waiting = list(pairs.values())
    while waiting:
        time.sleep(0.05)
        waiting = [pair for pair in waiting if not pair.collect()]
    print(json.dumps({fault: [rank for _, rank in sorted(pair.ended.items())] for fault, pair in pairs.items()}))


if __name__ == "__main__":
    if "RANK" in os.environ:
        run(sys.argv[2], int(os.environ["RANK"]), Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
