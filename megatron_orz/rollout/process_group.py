"""A process group of a rank of the trainer and the servers' workers, which touches neither side's own groups.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_orz.rollout.meeting import Meeting

TRAINER_RANK = 0
NUM_CONNECTIONS = 2
"""Of gloo, between any two ranks; operations take them in turns."""


def join_group(backend: str, meeting: Meeting, rank: int) -> Any:
    """A ProcessGroupGloo or ProcessGroupNCCL of a sender (rank 0) and all workers; returns when all have joined.

    Every operation in it has the meeting's deadline.
    """
    store = dist.PrefixStore(f"group/{meeting.sender}", meeting.store)
    return _join(backend, store, meeting, rank, num_connections=NUM_CONNECTIONS)


def join_torch_group(backend: str, meeting: Meeting, rank: int, *, name: str) -> Any:
    """`join_group`, with others who join by torch's own functions: a process group of that name at the address of the
    meeting's store, as SGLang makes it. The keys in the store, and gloo's one connection, are torch's."""
    store: dist.Store = meeting.store
    for prefix in (name, f"{name}/", "cuda/" if backend == "nccl" else "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return _join(backend, store, meeting, rank, num_connections=1)


def _join(backend: str, store: dist.Store, meeting: Meeting, rank: int, *, num_connections: int) -> Any:
    size = 1 + meeting.num_workers
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=meeting.timeout_s)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo  # parts of it are missing from torch's stubs
    options = gloo._Options()
    options._timeout = timedelta(seconds=meeting.timeout_s)
    # The default device resolves the host's name, which fails where that has no address.
    options._devices = [gloo.create_device(hostname=meeting.address) for _ in range(num_connections)]
    return gloo(store, rank, size, options)
