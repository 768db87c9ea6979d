"""A process group of the trainer and the servers' workers, which touches neither side's own groups.

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
    """A ProcessGroupGloo or ProcessGroupNCCL of the trainer (rank 0) and all workers; returns when all have joined.

    Every operation in it has the meeting's deadline.
    """
    store = dist.PrefixStore("group", meeting.store)
    size = 1 + meeting.num_workers
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=meeting.timeout_s)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo  # parts of it are missing from torch's stubs
    options = gloo._Options()
    options._timeout = timedelta(seconds=meeting.timeout_s)
    # The default device resolves the host's name, which fails where that has no address.
    options._devices = [gloo.create_device(hostname=meeting.address) for _ in range(NUM_CONNECTIONS)]
    return gloo(store, rank, size, options)
