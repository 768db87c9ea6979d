"""The weights of one rank on their way to all workers, in buckets: one is filled while another is under way.

Knows nothing of servers: their requests, and the order of an update, are the business of senders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_orz.config import Verification
from megatron_orz.rollout.buckets import Bucket, fill_buckets
from megatron_orz.rollout.delta import SentCopies
from megatron_orz.rollout.meeting import Meeting
from megatron_orz.rollout.verification import Digests, SentDigests
from megatron_orz.types import NamedWeights

BUCKET_BYTES = 64 * 2**20
CHANGES_BUCKET_BYTES = 4 * 2**20
"""Of buckets of changes, which are a few per cent of the weights they belong to."""
NUM_SLOTS = 2


class Transport(Protocol):
    """The trainer's half: moves buckets to all workers of all servers."""

    name: str
    """What the workers know it by."""

    def connect(self, meeting: Meeting) -> None:
        """Joins the workers, which do the same at this moment."""
        ...

    def buffer(self, slot: int, num_bytes: int) -> Tensor:
        """Memory for a bucket, [at least num_bytes] uint8. What was sent from this slot before has been released."""
        ...

    def send(self, bucket: Bucket, slot: int) -> dict[str, Any]:
        """Begins to move a bucket that lies in the buffer of `slot`. Returns what the workers need to find it; JSON."""
        ...

    def close(self) -> None:
        """Leaves the workers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a rank has sent in an update."""

    digests: Digests
    """Of the tensors to verify."""
    num_bytes: int
    wait_s: float
    """In which the rank only waited for workers."""
    num_elements: int = 0
    num_sent_elements: int = 0
    """With `delta`."""


class WeightStream:
    """One update after another: `begin`, `send`, `drain`, and `commit` once the servers hold the weights.

    dtype: of the servers' weights, and so of those on the way. verification, delta: as of `WeightSender`.
    """

    def __init__(
        self, transport: Transport, meeting: Meeting, dtype: torch.dtype, *, verification: Verification, delta: bool
    ) -> None:
        self._transport = transport
        self._meeting = meeting
        self._dtype = dtype
        self._verification: Verification = verification
        self._copies = SentCopies(dtype) if delta else None
        self._num_updates = 0
        self._in_slot: list[int | None] = [None] * NUM_SLOTS

    def begin(self) -> int | None:
        """The version that the next update changes; None where it is sent whole."""
        self._in_slot = [None] * NUM_SLOTS
        return self._copies.begin() if self._copies is not None else None

    def send(self, weights: NamedWeights, base: int | None, check: Callable[[], None]) -> Sent:
        """Moves the weights; returns when all are announced. check: called before each bucket, and in every wait."""
        num_bytes, wait_s = 0, 0.0
        slots: Iterator[int] = (index % NUM_SLOTS for index in count())
        slot = next(slots)

        def buffer(least_bytes: int) -> Tensor:
            nonlocal wait_s
            if (number := self._in_slot[slot]) is not None:
                begin = time.perf_counter()
                self._meeting.wait_until_released(number, check)
                wait_s += time.perf_counter() - begin
                self._in_slot[slot] = None
            return self._transport.buffer(slot, least_bytes)

        digests = SentDigests(self._verification, num_updates=self._num_updates, dtype=self._dtype)
        watched = digests.watch(weights)
        encoded = watched if self._copies is None else self._copies.encode(watched)
        capacity_bytes = BUCKET_BYTES if base is None else CHANGES_BUCKET_BYTES
        for bucket in fill_buckets(encoded, capacity_bytes, buffer, dtype=self._dtype):
            check()
            num_bytes += bucket.payload.nbytes
            place = self._transport.send(bucket, slot)
            self._in_slot[slot] = self._meeting.announce(bucket.header | place)
            slot = next(slots)
        return Sent(
            digests=digests.sent,
            num_bytes=num_bytes,
            wait_s=wait_s,
            num_elements=self._copies.num_elements if self._copies is not None else 0,
            num_sent_elements=self._copies.num_sent if self._copies is not None else 0,
        )

    def drain(self, check: Callable[[], object]) -> None:
        """Waits until the workers have released what is still under way."""
        for number in self._in_slot:
            if number is not None:
                self._meeting.wait_until_released(number, check)

    def commit(self, version: int) -> None:
        """The servers hold what was sent, and call it `version`."""
        if self._copies is not None:
            self._copies.commit(version)
        self._num_updates += 1
