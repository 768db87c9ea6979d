"""Ends a run that hangs, and a rank whose run has failed elsewhere, with the reason said once.

A thread of every rank looks once a second:

    nobody moves     no rank has begun or ended a phase, a rollout, a grade or a mini-batch within the deadline: every
                     rank writes the stacks of its threads to `stacks/rank-<n>.txt` and ends with exit code 124
    a rank failed    the others have 10 s to end by themselves, and are ended with the same exit code
    a rank is lost   killed, or crashed without a word: the others end likewise, with exit code 123

docs/hangs.md lists the deadlines of everything else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron_orz.command_line import EXPECTED_ERRORS, HUNG, INTERRUPTED, RANK_LOST, USER_ERROR, RunEnded
from megatron_orz.peers import Failure, Peers
from megatron_orz.ranks import RemoteError

STACKS = "stacks"
"""Directory of the stacks, in the run directory."""

POLL_S = 1.0
GRACE_S = 10.0
"""How long a rank may take to end by itself once the run has failed."""

_CAUSE_WAIT_S = 3.0
"""A broken connection is noticed before its cause is known: the end of a process, or what that rank has to say."""
_REMOTE_CAUSE_WAIT_S = 30.0
"""Another rank has failed, and says so when it has closed what it had opened."""

_STDERR = 2


class Watchdog:
    """Watches one rank of a run; a context manager around all of it.

    with Watchdog(config.run_dir, timeout_s=config.hang_timeout_s) as watchdog, open_mesh(...) as mesh:
        with watchdog.watching_peers(), RunLog(..., on_progress=watchdog.progress) as log:
            ...
    """

    def __init__(self, run_dir: Path, *, timeout_s: float) -> None:
        """timeout_s: the longest time without progress on any rank."""
        self._directory = run_dir / STACKS
        self._timeout_s = timeout_s
        self._peers: Peers | None = None
        self._count = 0
        self._phase = "the start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self, phase: str) -> None:
        """This rank begins or ends a phase, or a part of one. Called from any thread."""
        self._phase = phase
        self._count += 1

    @contextlib.contextmanager
    def watching_peers(self) -> Iterator[None]:
        """Inside, the failure of one rank ends all of them. Called by every rank, once there is a process group.

        An error in the body is reported to the other ranks. One that only follows from the failure of another rank is
        replaced by RunEnded, which says nothing where that rank has said it.
        """
        peers = self._peers = Peers.connect()
        try:
            yield
        except SystemExit:  # in order, and on every rank
            if peers is not None:
                with contextlib.suppress(dist.DistError):
                    peers.finish()
            raise
        except (Exception, KeyboardInterrupt) as error:
            if peers is not None:
                _report(peers, error)
            raise
        else:
            if peers is not None:
                peers.finish()
        finally:
            self._peers = None

    def _watch(self) -> None:
        stillness = _Stillness()
        num_told = 0
        while not self._stop.wait(POLL_S):
            self._watch_the_interpreter()
            peers, count = self._peers, self._count
            failure = None if peers is None else peers.failure()
            if failure is None and stillness.seconds(_total(peers, count, num_told)) > self._timeout_s:
                failure = self._hang(peers)
            num_told = count
            if failure is not None:
                self._end(failure, is_mine=peers is None or failure.rank == peers.rank)
                return

    def _watch_the_interpreter(self) -> None:
        """Where a call keeps the interpreter's lock the watchdog stands still too; faulthandler's thread needs none."""
        faulthandler.dump_traceback_later(self._timeout_s + 3 * GRACE_S, exit=True, file=_STDERR)

    def _hang(self, peers: Peers | None) -> Failure:
        rank = 0 if peers is None else peers.rank
        message = (
            f"nothing has moved for hang_timeout_s = {self._timeout_s:g} s; rank {rank} is in {self._phase}; "
            f"where all ranks stand is in {self._directory}; raise hang_timeout_s if the run is only slow"
        )
        failure = Failure(rank=rank, exit_code=HUNG, message=message, is_hang=True)
        return failure if peers is None else peers.report(failure)

    def _end(self, failure: Failure, *, is_mine: bool) -> None:
        """Ends this process, unless it ends by itself in time."""
        if failure.is_hang:
            # In a thread, because a file system may be what hangs.
            writing = threading.Thread(target=self._write_stacks, daemon=True)
            writing.start()
            writing.join(GRACE_S)
        if not self._stop.wait(GRACE_S):
            if is_mine:
                print(f"error: {failure.message}", file=sys.stderr, flush=True)
            os._exit(failure.exit_code)

    def _write_stacks(self) -> None:
        rank = 0 if self._peers is None else self._peers.rank
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(self._directory / f"rank-{rank:05d}.txt", "w") as file:
                print(f"rank {rank}, process {os.getpid()}, in {self._phase}, {time.ctime()}\n", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"cannot write the stacks of rank {rank} to {self._directory}: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(_STDERR, all_threads=True)

    def __enter__(self) -> Self:
        self._watch_the_interpreter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(POLL_S)
        faulthandler.cancel_dump_traceback_later()


class _Stillness:
    """How long a count has been the same, while this process ran: time in which it was stopped does not count."""

    def __init__(self) -> None:
        self._count, self._seconds, self._last = -1, 0.0, time.monotonic()

    def seconds(self, count: int) -> float:
        now = time.monotonic()
        self._seconds = 0.0 if count != self._count else self._seconds + min(now - self._last, 5 * POLL_S)
        self._count, self._last = count, now
        return self._seconds


def _total(peers: Peers | None, count: int, num_told: int) -> int:
    """The progress of all ranks; this one's counts `count`, of which the others know `num_told`."""
    if peers is None:
        return count
    try:
        return peers.add_progress(count - num_told)
    except dist.DistError:  # the store is gone, which the next look reports
        return count


def _report(peers: Peers, error: Exception | KeyboardInterrupt) -> None:
    """Tells the others. Raises RunEnded when the error follows from another failure."""
    if isinstance(error, RuntimeError):  # what collectives raise when a rank is gone
        wait_s = _REMOTE_CAUSE_WAIT_S if isinstance(error, RemoteError) else _CAUSE_WAIT_S
        deadline = time.monotonic() + wait_s
        while peers.failure() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    cause = peers.report(
        Failure(
            rank=peers.rank,
            exit_code=_exit_code(error),
            message=f"{type(error).__name__}: {error}",
            is_everywhere=isinstance(error, ValueError),
        )
    )
    if peers.rank == 0:
        time.sleep(2 * POLL_S)  # the store may live in this process: the others read the cause before it goes
    if isinstance(error, ValueError | KeyboardInterrupt):
        return
    if cause.rank != peers.rank or cause.exit_code in (RANK_LOST, HUNG):
        speaker = 0 if cause.is_everywhere else cause.rank
        raise RunEnded(cause.message, exit_code=cause.exit_code, is_said=peers.rank != speaker) from error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return USER_ERROR if isinstance(error, EXPECTED_ERRORS) else 1
