"""The workers' side of an update: from announcements to tensors. Nothing of vLLM, and nothing of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_orz.rollout.delta import HeldCopies
from megatron_orz.rollout.disk_transport import DiskReceiver
from megatron_orz.rollout.gloo_transport import GlooReceiver
from megatron_orz.rollout.ipc_transport import IPCReceiver
from megatron_orz.rollout.meeting import Meeting
from megatron_orz.rollout.nccl_transport import NCCLReceiver


class Receiver(Protocol):
    """The workers' half of a transport. Workers are ranked from 1; the trainer is 0."""

    def receive(self, message: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """The tensors of an announced bucket, on the worker's device; valid until it is released."""
        ...

    def close(self) -> None:
        """Leaves the trainer."""
        ...


RECEIVERS: Mapping[str, Callable[[Meeting, int, torch.device], Receiver]] = {
    "gloo": GlooReceiver,
    "nccl": NCCLReceiver,
    "ipc": IPCReceiver,
    "disk": DiskReceiver,
}


@dataclass
class Offer:
    """Where the trainer waits, and how weights will come."""

    transport: str
    address: str
    port: int
    first_rank: int
    """Of the server's first worker."""
    num_workers: int
    """Of all servers."""
    timeout_s: float
    delta: bool = False
    """Updates hold only what has changed."""
    num_senders: int = 1
    """Ranks of the trainer, each with a part of the weights."""


@dataclass
class Update:
    """What an update makes of what."""

    version: int
    base: int | None = None
    """The version whose changes are sent; None: all weights are."""


class WeightReceiver:
    """A worker's end of the connection to the trainer."""

    def __init__(self, offer: Offer, worker: int, device: torch.device) -> None:
        """Joins the trainer. worker: index within the server."""
        self._meeting = Meeting.join(
            offer.address, offer.port, num_workers=offer.num_workers, timeout_s=offer.timeout_s
        )
        self._copies = HeldCopies(device) if offer.delta else None
        arrival = torch.device("cpu") if offer.delta else device
        rank = offer.first_rank + worker
        self._halves = [
            RECEIVERS[offer.transport](self._meeting.of(sender), rank, arrival) for sender in range(offer.num_senders)
        ]
        self._num_heard = 0

    def buckets(self, update: Update) -> Iterator[list[tuple[str, Tensor]]]:
        """The tensors of an update, bucket by bucket; those of a bucket are valid until the next one is asked for.

        Raises RuntimeError for changes of weights that this worker does not hold.
        """
        if self._copies is not None:
            self._copies.begin(update.base)
        has_ended = False
        while not has_ended:
            message = self._meeting.hear(self._num_heard)
            has_ended = not message["names"]
            if not has_ended:
                tensors = self._halves[message["sender"]].receive(message)
                yield from [tensors] if self._copies is None else self._copies.decode(tensors)
            self._meeting.release(self._num_heard)
            self._num_heard += 1
        if self._copies is not None:
            self._copies.commit(update.version)

    def close(self) -> None:
        """Leaves the trainer."""
        for half in self._halves:
            half.close()
