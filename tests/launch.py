"""Runs a function on several local ranks, as torchrun would."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(*args)` in `world_size` new processes; an exception in one of them is raised here."""
    mp.spawn(_rank_main, args=(world_size, free_port(), function, args), nprocs=world_size)


def _rank_main(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(*args)
