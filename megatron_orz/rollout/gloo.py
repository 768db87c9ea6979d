"""A process group of the trainer and a server's workers, which touches neither side's own groups.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

TRAINER_RANK = 0
FIRST_WORKER_RANK = 1


def listen(*, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The trainer's meeting point, on a free loopback port (`store.port`)."""
    # Left to itself, the store listens on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def join(store: dist.TCPStore, *, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroupGloo:
    """Joins the group; returns when all have. `timeout_s` is the deadline of this and of every later operation."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing from torch's stubs
    options._timeout = timedelta(seconds=timeout_s)
    # The default device resolves the host's name, which fails where that has no address.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=store.host)]
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)


def broadcast(group: dist.ProcessGroupGloo, payload: Tensor) -> None:
    """Fills `payload` on every worker with the trainer's; returns when this side is done with it."""
    group.broadcast(payload, TRAINER_RANK).wait()  # type: ignore[attr-defined]  # missing from torch's stubs
