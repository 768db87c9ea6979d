"""The gloo transport: broadcasts over sockets through the CPU's memory, wherever the models live.

A bucket goes over two connections at once: each is bound by the one thread that copies for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from megatron_orz.rollout.buckets import Bucket, num_payload_bytes, read_bucket
from megatron_orz.rollout.meeting import Meeting
from megatron_orz.rollout.process_group import NUM_CONNECTIONS, TRAINER_RANK, join_group


class GlooTransport:
    """The trainer's half."""

    name = "gloo"

    def __init__(self) -> None:
        self._group: Any = None
        self._buffers: dict[int, Tensor] = {}
        self._sends: dict[int, list[Any]] = {}

    def connect(self, meeting: Meeting) -> None:
        """Joins the group as its first rank."""
        self._group = join_group("gloo", meeting, TRAINER_RANK)

    def buffer(self, slot: int, num_bytes: int) -> Tensor:
        """Memory of the CPU, pinned where there are GPUs."""
        for send in self._sends.pop(slot, ()):
            send.wait()
        if slot not in self._buffers or len(self._buffers[slot]) < num_bytes:
            self._buffers[slot] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._buffers[slot]

    def send(self, bucket: Bucket, slot: int) -> dict[str, Any]:
        """Begins to broadcast the bytes."""
        assert self._group is not None, "connect comes first"
        self._sends[slot] = _broadcast(self._group, bucket.payload)
        return {}

    def close(self) -> None:
        """Leaves the group. Taking it down waits for a broadcast that a worker has left; a thread does that waiting."""
        sends = list(chain.from_iterable(self._sends.values()))
        Thread(target=_outlast, args=(self._group, sends), name="gloo", daemon=True).start()
        self._group = None
        self._sends.clear()
        self._buffers.clear()


def _broadcast(group: Any, payload: Tensor) -> list[Any]:
    """Begins to move the bytes, [n] uint8, from the trainer to everybody."""
    return [group.broadcast(part, TRAINER_RANK) for part in payload.chunk(NUM_CONNECTIONS)]


def _outlast(group: Any, sends: Sequence[Any]) -> None:
    """Keeps the group until nothing is under way in it."""
    for send in sends:
        with suppress(RuntimeError):
            send.wait()


class GlooReceiver:
    """A worker's half."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device) -> None:
        self._group = join_group("gloo", meeting, rank)
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def receive(self, message: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Receives the bytes, into the same memory every time, and brings them to the device."""
        num_bytes = num_payload_bytes(message)
        if len(self._buffer) < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        payload = self._buffer[:num_bytes]
        for part in _broadcast(self._group, payload):
            part.wait()
        return read_bucket(message, payload.to(self._device)).tensors()

    def close(self) -> None:
        """Leaves the group."""
        self._group = None
