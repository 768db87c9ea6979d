"""The nccl transport: a broadcast from GPU to GPU, for servers with GPUs of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_orz.rollout.buckets import Bucket, num_payload_bytes, read_bucket
from megatron_orz.rollout.meeting import Meeting
from megatron_orz.rollout.process_group import TRAINER_RANK, join_group


class NCCLTransport:
    """The trainer's half."""

    name = "nccl"

    def __init__(self) -> None:
        # A thread that connects would begin with the first GPU, whichever is this rank's.
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._group: Any = None
        self._buffers: dict[int, Tensor] = {}

    def connect(self, meeting: Meeting) -> None:
        """Joins the group as its first rank; the communicator itself is made by a first, tiny broadcast."""
        self._group = join_group("nccl", meeting, TRAINER_RANK)
        self._group.broadcast(torch.zeros(1, device=self._device), TRAINER_RANK).wait()
        torch.cuda.synchronize(self._device)

    def buffer(self, slot: int, num_bytes: int) -> Tensor:
        """Memory of this rank's GPU."""
        if slot not in self._buffers or len(self._buffers[slot]) < num_bytes:
            self._buffers[slot] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._buffers[slot]

    def send(self, bucket: Bucket, slot: int) -> dict[str, Any]:
        """Queues the broadcast behind the copies that fill the bucket."""
        assert self._group is not None, "connect comes first"
        self._group.broadcast(bucket.payload, TRAINER_RANK)
        return {}

    def close(self) -> None:
        """Aborts what may still be under way, and gives the buffers back."""
        if self._group is not None:
            self._group.abort()
        self._group = None
        self._buffers.clear()


class NCCLReceiver:
    """A worker's half."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device) -> None:
        self._device = device
        self._group = join_group("nccl", meeting, rank)
        self._group.broadcast(torch.zeros(1, device=device), TRAINER_RANK).wait()
        torch.cuda.synchronize(device)

    def receive(self, message: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Receives the bytes; what is queued on the stream later sees them."""
        payload = torch.empty(num_payload_bytes(message), dtype=torch.uint8, device=self._device)
        self._group.broadcast(payload, TRAINER_RANK).wait()
        return read_bucket(message, payload).tensors()

    def close(self) -> None:
        """Leaves the group."""
        self._group = None
