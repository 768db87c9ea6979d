"""What trainer ranks tell each other beside their collectives: that they move, which of them failed first, and its end.

It goes through the store of the rendezvous, over a connection of its own: a rank that is stuck in a collective is still
seen, and still told.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self

import psutil
import torch.distributed as dist

from megatron_orz.command_line import RANK_LOST

_STORE_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why the run ends."""

    rank: int
    """Who says it."""
    exit_code: int
    message: str
    is_hang: bool = False
    is_everywhere: bool = False
    """Something is wrong with the input, of which rank 0 speaks for all."""


class Peers:
    """All trainer ranks as one of them sees them."""

    def __init__(self, store: dist.Store, *, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._first: Failure | None = None
        self._lock = threading.Lock()  # the watchdog's thread looks, and the one that fails
        self._unknown = set(range(size)) - {rank}  # ranks whose process is not known yet
        self._watched: dict[int, _Process] = {}  # processes on this machine that have not ended
        store.set(f"process/{rank}", _Process.current().to_json())

    @classmethod
    def connect(cls) -> Self | None:
        """The ranks of the default process group; None for a single one."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT
        )
        # torchrun keeps its store when it starts the ranks again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"peers/{attempt}", store), rank=dist.get_rank(), size=dist.get_world_size())

    def add_progress(self, count: int) -> int:
        """Adds to the progress of all ranks together, and returns it. Raises DistError when the store is gone."""
        return int(self._store.add("progress", count))

    def failure(self) -> Failure | None:
        """The first failure that any rank has reported; the loss of a rank of this machine is reported here."""
        with self._lock:
            if self._first is None:
                self._first = self._look()
            return self._first

    def _look(self) -> Failure | None:
        dead = [rank for rank, process in self._watched.items() if not process.is_alive()]
        if 0 in dead:  # and with it perhaps the store
            return _loss(0, self._watched[0], speaker=1)
        try:
            if self._store.check(["failure"]):
                return Failure(**json.loads(self._store.get("failure")))
            self._learn_processes()
            for rank in dead:
                process = self._watched.pop(rank)
                if not self._store.check([f"finished/{rank}"]):
                    return self._report(_loss(rank, process, speaker=self.rank))
        except dist.DistError:
            if 0 in self._watched and not self._watched[0].is_alive():  # it has died since the first look
                return _loss(0, self._watched[0], speaker=1)
            message = "the store of the rendezvous is gone: rank 0, or the torchrun that held it, has ended"
            return Failure(rank=1, exit_code=RANK_LOST, message=message)
        return None

    def report(self, failure: Failure) -> Failure:
        """Reports a failure; returns the first that any rank has reported."""
        with self._lock:
            if self._first is None:
                self._first = self._report(failure)
            return self._first

    def _report(self, failure: Failure) -> Failure:
        try:
            return Failure(**json.loads(self._store.compare_set("failure", "", json.dumps(asdict(failure)))))
        except dist.DistError:
            return failure

    def finish(self) -> None:
        """Says that this rank ends in order: its end is no failure. Rank 0, which may hold the store, ends last.

        Raises DistError when the store is gone, and when another rank takes longer than 30 s to end as well.
        """
        self._store.set(f"finished/{self.rank}", "")
        if self.rank == 0:
            self._store.wait([f"finished/{rank}" for rank in range(1, self.size)])

    def _learn_processes(self) -> None:
        """Watches the processes of this machine as soon as they are known."""
        for rank in [rank for rank in self._unknown if self._store.check([f"process/{rank}"])]:
            self._unknown.remove(rank)
            process = _Process.from_json(self._store.get(f"process/{rank}"))
            if process.machine == _machine():
                self._watched[rank] = process


@dataclass(frozen=True, kw_only=True)
class _Process:
    machine: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Self:
        return cls(machine=_machine(), pid=os.getpid(), started=psutil.Process().create_time())

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _loss(rank: int, process: _Process, *, speaker: int) -> Failure:
    message = f"rank {rank} (process {process.pid}) was killed or crashed: it ended without an error message"
    return Failure(rank=speaker, exit_code=RANK_LOST, message=message)


def _machine() -> str:
    """Processes with the same one see each other's ids: same boot, same container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
