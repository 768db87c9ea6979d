"""Runs a function on several local ranks, as torchrun would."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_orz.rollout.servers import free_port


def run_ranks(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(*args)` in `world_size` new processes; an exception in one of them is raised here."""
    mp.spawn(rank_main, args=(world_size, free_port(), function, args), nprocs=world_size)


class RankPool:
    """Ranks that run one function after another, so that each process pays for its imports once."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Calls `function(*args)` on every rank; what one of them raises is raised here, with its traceback.

        After an error the processes are replaced: the others may be waiting for the one that failed.
        """
        if not self._processes:
            self._start()
        port = free_port()
        for pipe in self._pipes:
            pipe.send((port, function, args))
        waiting = list(self._pipes)
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                try:
                    error = pipe.recv()
                except EOFError:
                    error = (RuntimeError("a rank died"), "no traceback")
                if error is not None:
                    self.close()
                    raise error[0] from RuntimeError(error[1])
                waiting.remove(pipe)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world_size: int, pipe: Connection) -> None:
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            return
        try:
            rank_main(rank, world_size, port, function, args)
            pipe.send(None)
        except Exception as error:
            pipe.send((error, traceback.format_exc()))
        # Models are cycles of references; process groups that they hold keep dozens of threads alive.
        gc.collect()


def rank_main(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """What one of the processes does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(*args)
    if dist.is_initialized():  # a process that ends with the threads of its groups may abort
        dist.destroy_process_group()
