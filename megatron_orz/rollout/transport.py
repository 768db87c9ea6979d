"""How new weights reach live servers: in buckets, over a transport, in the order of vLLM's update protocol.

    trainer   fill a bucket (gather, convert, copy) -> send -> announce   | two buckets in turn: one is filled while
    worker    hear -> receive -> load -> release                          | the other is under way or being loaded

The two halves of a transport, and the meeting where they keep step, know nothing of vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, count
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_orz.config import Verification
from megatron_orz.rollout.buckets import Bucket, fill_buckets
from megatron_orz.rollout.delta import VALUE_BYTES, SentCopies
from megatron_orz.rollout.meeting import Meeting, meeting_address
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.verification import SentDigests
from megatron_orz.rollout.waiting import Deadline, first_error, in_background
from megatron_orz.types import Metrics, NamedWeights

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


class Client(Protocol):
    """Talks to one server, by its own requests."""

    url: str

    def get(self, path: str, *, timeout_s: float = ...) -> dict[str, Any]: ...

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = ...,
    ) -> dict[str, Any]: ...


class WeightSender:
    """Updates servers over one transport: one send reaches all of them.

    timeout_s: deadline of connecting, and of one whole update.
    keeps_requests: there may be requests amid their responses, which go on with the new weights.
    delta: after the first update, and until one fails, send only what has changed.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        transport: Transport,
        *,
        timeout_s: float,
        verification: Verification = "sampled",
        keeps_requests: bool = False,
        delta: bool = False,
    ) -> None:
        self._clients = clients
        self._transport = transport
        self._timeout_s = timeout_s
        self._verification = verification
        self._keeps_requests = keeps_requests
        self._delta = delta
        self._copies: SentCopies | None = None
        self._posts = ThreadPoolExecutor(len(clients), "weights")
        self._meeting: Meeting | None = None
        self._dtype: torch.dtype | None = None  # the servers', and that of the weights on the way
        self._metrics: Metrics = {}
        self._num_messages = 0
        self._num_updates = 0

    def connect(self) -> None:
        """Joins the trainer and the workers of every server, which are numbered in the order of the clients.

        Raises ServerError, RuntimeError, or ValueError when the servers' weights have different types, or one that
        changes cannot be sent of.
        """
        deadline = Deadline(self._timeout_s)
        sizes = [int(client.get("/get_world_size")["world_size"]) for client in self._clients]
        address = meeting_address([client.url for client in self._clients])
        self._meeting = Meeting.host(address, num_workers=sum(sizes), timeout_s=self._timeout_s)
        offer = {
            "transport": self._transport.name,
            "address": address,
            "port": self._meeting.store.port,
            "num_workers": sum(sizes),
            "timeout_s": self._timeout_s,
            "delta": self._delta,
        }
        joining = [
            self._posts.submit(
                client.post,
                "/init_weight_transfer_engine",
                {"init_info": {**offer, "first_rank": first_rank}},
                timeout_s=deadline.remaining_s(),
            )
            for client, first_rank in zip(self._clients, accumulate(sizes[:-1], initial=1), strict=True)
        ]
        first_error([*joining, in_background(partial(self._transport.connect, self._meeting))])
        answers = self._post_all(deadline, "/collective_rpc", {"method": "meet_trainer"})
        dtypes = {worker["dtype"] for answer in answers for worker in answer["results"]}
        if len(dtypes) != 1:
            raise ValueError(
                f"the servers' weights have types {sorted(dtypes)}; start all of them with the same --dtype"
            )
        self._dtype = dtype = getattr(torch, dtypes.pop())
        if self._delta:
            if dtype.itemsize != VALUE_BYTES:
                raise ValueError(
                    f"the servers' weights are of {dtype}, nearly all of which change at every step, so that "
                    "fleet.delta saves nothing; start the servers with --dtype bfloat16, or set fleet.delta to false"
                )
            self._copies = SentCopies(dtype)

    def send(self, weights: NamedWeights, version: int) -> None:
        """Gives the servers new weights; their later rollouts are of `version`.

        Raises ServerError, WeightMismatch or RuntimeError; the servers then hold neither the old nor the new weights.
        """
        started, deadline = time.perf_counter(), Deadline(self._timeout_s)
        post = partial(self._post_all, deadline)
        digests = SentDigests(self._verification, num_updates=self._num_updates, dtype=self._dtype)
        base = self._copies.begin() if self._copies is not None else None
        post("/pause", query={"mode": "keep", "clear_cache": "false"})
        post("/start_weight_update")
        moved = self._stream(digests.watch(weights), version, base, deadline)
        post("/finish_weight_update")
        sent = time.perf_counter()
        if digests.names:
            held = post("/collective_rpc", {"method": "weight_digests", "args": [digests.names]})
            for client, answer in zip(self._clients, held, strict=True):
                digests.compare(answer["results"], client.url)
        verified = time.perf_counter()
        # An update leaves the cached keys and values of the old weights in place. Requests amid their responses compute
        # theirs anew, so that what they go on with is what the new weights would have.
        kept = {"reset_running_requests": str(self._keeps_requests).lower()}
        if not all(answer["success"] for answer in post("/reset_prefix_cache", query=kept)):
            raise ServerError("a server could not reset its prefix cache: requests still hold parts of it")
        post("/update_weight_version", {"new_version": str(version)})
        post("/resume")
        if self._copies is not None:
            self._copies.commit(version)
            moved["sync/sent_share"] = self._copies.sent_share
        self._num_updates += 1
        self._metrics = moved | {
            "sync/send_s": sent - started,
            "sync/verify_s": verified - sent,
            "sync/verified_tensors": float(len(digests.names)),
        }

    def metrics(self) -> Metrics:
        """Of the last update: bytes on the way, seconds until they were loaded, how many of those the trainer only
        waited for workers, and seconds of verification, in which the trainer's own digests are not; with `delta` the
        share of elements that were sent."""
        return self._metrics

    def close(self) -> None:
        """Leaves the workers."""
        self._transport.close()
        self._meeting = None
        self._posts.shutdown(wait=False, cancel_futures=True)

    def _stream(self, weights: NamedWeights, version: int, base: int | None, deadline: Deadline) -> Metrics:
        """Moves the weights while every server is in its call that receives and loads them."""
        assert self._meeting is not None, "connect comes first"
        meeting, transport = self._meeting, self._transport
        body = {"update_info": {"first_message": self._num_messages, "version": version, "base": base}}
        loading = [
            self._posts.submit(client.post, "/update_weights", body, timeout_s=deadline.remaining_s())
            for client in self._clients
        ]

        def check() -> None:
            deadline.remaining_s()
            for future in loading:
                if future.done():
                    future.result()
                    raise ServerError("a server ended a weight update before all weights were sent")

        num_bytes, wait_s = 0, 0.0
        in_slot: list[int | None] = [None] * NUM_SLOTS
        slots: Iterator[int] = (index % NUM_SLOTS for index in count())
        slot = next(slots)

        def buffer(least_bytes: int) -> Tensor:
            nonlocal wait_s
            if (number := in_slot[slot]) is not None:
                begin = time.perf_counter()
                meeting.wait_until_released(number, check)
                wait_s += time.perf_counter() - begin
                in_slot[slot] = None
            return transport.buffer(slot, least_bytes)

        capacity_bytes = BUCKET_BYTES if base is None else CHANGES_BUCKET_BYTES
        encoded = weights if self._copies is None else self._copies.encode(weights)
        for bucket in fill_buckets(encoded, capacity_bytes, buffer, dtype=self._dtype):
            check()
            num_bytes += bucket.payload.nbytes
            place = transport.send(bucket, slot)
            in_slot[slot] = self._announce(bucket.header | place)
            slot = next(slots)
        end = self._announce({"names": []})
        begin = time.perf_counter()
        first_error(loading)
        wait_s += time.perf_counter() - begin
        for number in [*in_slot, end]:
            if number is not None:
                meeting.wait_until_released(number, deadline.remaining_s)
        return {"sync/gib": num_bytes / 2**30, "sync/wait_s": wait_s}

    def _announce(self, message: dict[str, Any]) -> int:
        assert self._meeting is not None
        number = self._num_messages
        self._meeting.announce(number, message)
        self._num_messages += 1
        return number

    def _post_all(
        self, deadline: Deadline, path: str, body: dict[str, Any] | None = None, *, query: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """The answers of all servers, asked at once."""
        posts = [
            self._posts.submit(client.post, path, body, query=query, timeout_s=deadline.remaining_s())
            for client in self._clients
        ]
        first_error(posts)
        return [post.result() for post in posts]
