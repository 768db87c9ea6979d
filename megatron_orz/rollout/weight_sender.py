"""How new weights reach live servers: by an update in the order of vLLM's requests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch

from megatron_orz.config import Verification
from megatron_orz.rollout.delta import VALUE_BYTES
from megatron_orz.rollout.meeting import Meeting, meeting_address
from megatron_orz.rollout.receiving import Offer
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.transport import Sent, Transport, WeightStream
from megatron_orz.rollout.verification import compare
from megatron_orz.rollout.waiting import Deadline, first_error, in_background
from megatron_orz.types import Metrics, NamedWeights


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
    num_senders: this one, which leads the update, and others, each with a part of the weights (`stage_senders.py`).
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
        num_senders: int = 1,
    ) -> None:
        self._clients = clients
        self._transport = transport
        self._timeout_s = timeout_s
        self._verification = verification
        self._keeps_requests = keeps_requests
        self._delta = delta
        self._num_senders = num_senders
        self._posts = ThreadPoolExecutor(len(clients), "weights")
        self._sizes: list[int] = []
        self._offer: Offer | None = None
        self._meeting: Meeting | None = None
        self._stream: WeightStream | None = None
        self._metrics: Metrics = {}

    def invite(self) -> Offer:
        """Opens the meeting, before `connect`, for other senders. Returns what they need to come to it.

        Raises ServerError, or ValueError for servers that reach this machine at different addresses.
        """
        self._sizes = [int(client.get("/get_world_size")["world_size"]) for client in self._clients]
        address, num_workers = meeting_address([client.url for client in self._clients]), sum(self._sizes)
        self._meeting = Meeting.host(address, num_workers=num_workers, timeout_s=self._timeout_s)
        self._offer = Offer(
            transport=self._transport.name,
            address=address,
            port=self._meeting.store.port,
            first_rank=1,
            num_workers=num_workers,
            timeout_s=self._timeout_s,
            delta=self._delta,
            num_senders=self._num_senders,
        )
        return self._offer

    def connect(self) -> None:
        """Joins the trainer and the workers of every server, which are numbered in the order of the clients.

        Raises ServerError, RuntimeError, or ValueError when the servers' weights have different types, or one that
        changes cannot be sent of.
        """
        offer = self._offer or self.invite()
        assert self._meeting is not None
        with self._meeting.sharing_fate():
            dtype = self._join(self._meeting, offer)
            self._stream = WeightStream(
                self._transport, self._meeting, dtype, verification=self._verification, delta=self._delta
            )
            for sender in range(1, self._num_senders):
                self._meeting.tell(f"dtype/{sender}", str(dtype).removeprefix("torch."))

    def _join(self, meeting: Meeting, offer: Offer) -> torch.dtype:
        """Returns the type of the servers' weights."""
        deadline = Deadline(self._timeout_s)
        joining = [
            self._posts.submit(
                client.post,
                "/init_weight_transfer_engine",
                {"init_info": asdict(replace(offer, first_rank=first_rank))},
                timeout_s=deadline.remaining_s(),
            )
            for client, first_rank in zip(self._clients, accumulate(self._sizes[:-1], initial=1), strict=True)
        ]
        first_error([*joining, in_background(partial(self._transport.connect, meeting.of(0)))], self._check_others)
        answers = self._post_all(deadline, "/collective_rpc", {"method": "meet_trainer"})
        dtypes = {worker["dtype"] for answer in answers for worker in answer["results"]}
        if len(dtypes) != 1:
            raise ValueError(
                f"the servers' weights have types {sorted(dtypes)}; start all of them with the same --dtype"
            )
        dtype: torch.dtype = getattr(torch, dtypes.pop())
        if self._delta and dtype.itemsize != VALUE_BYTES:
            raise ValueError(
                f"the servers' weights are of {dtype}, nearly all of which change at every step, so that "
                "fleet.delta saves nothing; start the servers with --dtype bfloat16, or set fleet.delta to false"
            )
        return dtype

    def send(self, weights: NamedWeights, version: int) -> None:
        """Gives the servers new weights; their later rollouts are of `version`.

        Raises ServerError, WeightMismatch or RuntimeError; the servers then hold neither the old nor the new weights.
        """
        assert self._meeting is not None, "connect comes first"
        assert self._stream is not None
        with self._meeting.sharing_fate():
            self._metrics = self._update(self._meeting, self._stream, weights, version)

    def metrics(self) -> Metrics:
        """Of the last update: bytes on the way, seconds until they were loaded, how many of those the trainer only
        waited for workers, and seconds of verification, in which the trainer's own digests are not; with `delta` the
        share of elements that were sent."""
        return self._metrics

    def close(self) -> None:
        """Leaves the workers."""
        self._transport.close()
        self._meeting = self._stream = None
        self._posts.shutdown(wait=False, cancel_futures=True)

    def _update(self, meeting: Meeting, stream: WeightStream, weights: NamedWeights, version: int) -> Metrics:
        started, deadline = time.perf_counter(), Deadline(self._timeout_s)
        post = partial(self._post_all, deadline)
        base = stream.begin()
        post("/pause", query={"mode": "keep", "clear_cache": "false"})
        post("/start_weight_update")
        parts, wait_s = self._move(meeting, stream, weights, version, base, deadline)
        post("/finish_weight_update")
        sent = time.perf_counter()
        digests = {name: digest for part in parts for name, digest in part.digests.items()}
        if digests:
            held = post("/collective_rpc", {"method": "weight_digests", "args": [list(digests)]})
            for client, answer in zip(self._clients, held, strict=True):
                compare(digests, answer["results"], client.url)
        verified = time.perf_counter()
        # An update leaves the cached keys and values of the old weights in place. Requests amid their responses compute
        # theirs anew, so that what they go on with is what the new weights would have.
        kept = {"reset_running_requests": str(self._keeps_requests).lower()}
        if not all(answer["success"] for answer in post("/reset_prefix_cache", query=kept)):
            raise ServerError("a server could not reset its prefix cache: requests still hold parts of it")
        post("/update_weight_version", {"new_version": str(version)})
        post("/resume")
        stream.commit(version)
        for sender in range(1, self._num_senders):
            meeting.tell(f"end/{sender}", version)
        metrics = {
            "sync/gib": sum(part.num_bytes for part in parts) / 2**30,
            "sync/send_s": sent - started,
            "sync/wait_s": wait_s,
            "sync/verify_s": verified - sent,
            "sync/verified_tensors": float(len(digests)),
        }
        if self._delta:
            num_elements = sum(part.num_elements for part in parts)
            metrics["sync/sent_share"] = sum(part.num_sent_elements for part in parts) / max(1, num_elements)
        return metrics

    def _move(
        self,
        meeting: Meeting,
        stream: WeightStream,
        weights: NamedWeights,
        version: int,
        base: int | None,
        deadline: Deadline,
    ) -> tuple[list[Sent], float]:
        """Moves the weights while every server is in its call that receives and loads them.

        Returns what each sender has sent, and the seconds in which this one only waited for workers.
        """
        body = {"update_info": {"version": version, "base": base}}
        loading = [
            self._posts.submit(client.post, "/update_weights", body, timeout_s=deadline.remaining_s())
            for client in self._clients
        ]
        check = partial(self._check, loading, deadline)
        parts = [stream.send(weights, base, check)]
        for sender in range(1, self._num_senders):
            parts.append(Sent(**meeting.learn(f"sent/{sender}", check)))
        end = meeting.announce({"names": []})
        begin = time.perf_counter()
        first_error(loading)
        waited_s = time.perf_counter() - begin
        stream.drain(deadline.remaining_s)
        meeting.wait_until_released(end, deadline.remaining_s)
        return parts, parts[0].wait_s + waited_s

    def _check(self, loading: Sequence[Future[Any]], deadline: Deadline) -> None:
        """Raises when the servers, or other senders, cannot go on."""
        deadline.remaining_s()
        for future in loading:
            if future.done():
                future.result()
                raise ServerError("a server ended a weight update before all weights were sent")
        self._check_others()

    def _check_others(self) -> None:
        assert self._meeting is not None
        if self._num_senders > 1:
            self._meeting.check_others()

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
