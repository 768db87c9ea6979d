"""New weights for SGLang servers: broadcasts in a group that their workers join at SGLang's own requests.

    trainer   fill a bucket (gather, convert, copy) -> ask and broadcast   | two buckets in turn: one is filled while
    server    receive -> load -> answer                                    | the other is received and loaded

A request tells of one bucket, and the next one waits for its answer: requests of several connections could overtake
each other, broadcasts cannot.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, cycle
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from megatron_orz.rollout.buckets import Bucket, fill_buckets
from megatron_orz.rollout.meeting import Meeting, meeting_address
from megatron_orz.rollout.process_group import TRAINER_RANK, join_torch_group
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.waiting import Deadline, first_error, in_background
from megatron_orz.rollout.weight_sender import Client
from megatron_orz.types import Metrics, NamedWeights

GroupBackend: TypeAlias = Literal["nccl", "gloo"]

BUCKET_BYTES = 256 * 2**20
"""Larger than for servers that hear of buckets without a request for each."""
_LEAVE_TIMEOUT_S = 10.0
_WIRE_TYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class SGLangGroupSender:
    """Updates SGLang servers by NCCL, from GPU to GPU, or by gloo, from host memory: one broadcast reaches all of them.

    timeout_s: deadline of connecting, and of one whole update.
    """

    def __init__(self, clients: Sequence[Client], *, backend: GroupBackend, timeout_s: float) -> None:
        self._clients = clients
        self._backend: GroupBackend = backend
        self._timeout_s = timeout_s
        self._posts = ThreadPoolExecutor(len(clients), "weights")
        self._name = f"megatron_orz-{secrets.token_hex(4)}"  # a server keeps a group of this name until it is told
        self._meeting: Meeting | None = None
        self._group: Any = None
        self._is_idle = True
        self._dtype: torch.dtype | None = None
        self._slots = cycle([0, 1])
        self._buffers: dict[int, Tensor] = {}
        self._metrics: Metrics = {}

    def connect(self) -> None:
        """Joins the trainer and every tensor-parallel rank of every server, in the order of the clients.

        Raises ServerError, RuntimeError, or ValueError for a server that cannot join as a whole.
        """
        deadline = Deadline(self._timeout_s)
        servers = [client.get("/server_info") for client in self._clients]
        for client, server in zip(self._clients, servers, strict=True):
            _check_layout(client.url, server)
        sizes = [int(server["tp_size"]) for server in servers]
        dtypes = {server["dtype"] for server in servers}
        # `auto` does not say which type it is: the weights then go as they are, and the servers convert them.
        self._dtype = _WIRE_TYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
        address = meeting_address([client.url for client in self._clients])
        self._meeting = Meeting.host(address, num_workers=sum(sizes), timeout_s=self._timeout_s)
        offer = {
            "master_address": address,
            "master_port": self._meeting.store.port,
            "world_size": 1 + sum(sizes),
            "group_name": self._name,
            "backend": self._backend,
        }
        joining = [
            self._posts.submit(
                client.post,
                "/init_weights_update_group",
                offer | {"rank_offset": first_rank},
                timeout_s=deadline.remaining_s(),
            )
            for client, first_rank in zip(self._clients, accumulate(sizes[:-1], initial=1), strict=True)
        ]
        first_error([*joining, in_background(self._join)])

    def send(self, weights: NamedWeights, version: int) -> None:
        """Gives the servers new weights; their later rollouts are of `version`.

        Raises ServerError or RuntimeError; the servers then hold neither the old nor the new weights.
        """
        started, deadline = time.perf_counter(), Deadline(self._timeout_s)
        self._is_idle = False
        self._post_all(deadline, "/begin_weight_update", {})
        num_bytes, wait_s = 0, 0.0
        loading: list[Future[Any]] = []
        for bucket in fill_buckets(weights, BUCKET_BYTES, self._buffer, dtype=self._dtype):
            begin = time.perf_counter()
            first_error(loading)
            wait_s += time.perf_counter() - begin
            num_bytes += bucket.payload.nbytes
            loading = self._send(bucket, deadline)
        begin = time.perf_counter()
        first_error(loading)
        wait_s += time.perf_counter() - begin
        self._post_all(deadline, "/end_weight_update", {})
        self._post_all(deadline, "/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self._is_idle = True
        self._metrics = {
            "sync/send_s": time.perf_counter() - started,
            "sync/wait_s": wait_s,
            "sync/gib": num_bytes / 2**30,
            "sync/verified_tensors": 0.0,
        }

    def metrics(self) -> Metrics:
        """Of the last update: seconds until all weights were loaded, how many of those the trainer only waited for
        servers, and bytes on the way. Nothing is verified: SGLang gives no tensor back."""
        return self._metrics

    def close(self) -> None:
        """Leaves the servers, and has them forget the group, unless an update was broken off: they wait in it."""
        if self._group is not None and self._is_idle:
            leaving = [
                self._posts.submit(
                    client.post,
                    "/destroy_weights_update_group",
                    {"group_name": self._name},
                    timeout_s=_LEAVE_TIMEOUT_S,
                )
                for client in self._clients
            ]
            for future in leaving:
                future.exception()  # one that has died has left, too
        if self._group is not None and self._backend == "nccl":
            self._group.abort()
        self._group = self._meeting = None
        self._buffers.clear()
        self._posts.shutdown(wait=False, cancel_futures=True)

    def _join(self) -> None:
        assert self._meeting is not None
        self._group = join_torch_group(self._backend, self._meeting, TRAINER_RANK, name=self._name)

    def _buffer(self, num_bytes: int) -> Tensor:
        """Memory for the next bucket, [at least num_bytes] uint8: the bucket before the last one has been loaded."""
        slot = next(self._slots)
        if slot not in self._buffers or len(self._buffers[slot]) < num_bytes:
            is_gpu = self._backend == "nccl"
            self._buffers[slot] = torch.empty(
                num_bytes,
                dtype=torch.uint8,
                device="cuda" if is_gpu else "cpu",
                pin_memory=not is_gpu and torch.cuda.is_available(),
            )
        return self._buffers[slot]

    def _send(self, bucket: Bucket, deadline: Deadline) -> list[Future[Any]]:
        """Begins to move a bucket; every server answers when it has loaded it."""
        request = {
            "names": bucket.names,
            "shapes": bucket.shapes,
            "dtypes": [bucket.header["dtype"]] * len(bucket.names),
            "group_name": self._name,
            "load_format": "flattened_bucket",  # one broadcast for all of its tensors
            "flush_cache": True,
        }
        loading = [
            self._posts.submit(
                client.post, "/update_weights_from_distributed", request, timeout_s=deadline.remaining_s()
            )
            for client in self._clients
        ]
        # The first broadcast of NCCL waits for every rank: a server that refuses the request never comes.
        return [*loading, in_background(partial(_broadcast, self._group, bucket.payload))]

    def _post_all(self, deadline: Deadline, path: str, body: dict[str, Any]) -> None:
        timeout_s = deadline.remaining_s()
        first_error([self._posts.submit(client.post, path, body, timeout_s=timeout_s) for client in self._clients])


def _broadcast(group: Any, payload: Tensor) -> None:
    """Moves the bytes. Keeps the group meanwhile: taking gloo's down waits for a broadcast that others have left."""
    group.broadcast(payload, TRAINER_RANK).wait()


def _check_layout(url: str, server: dict[str, Any]) -> None:
    """SGLang numbers the workers of a group by their tensor-parallel rank alone."""
    missing = {"tp_size", "pp_size", "dp_size", "dtype"} - server.keys()
    if missing:
        raise ServerError(f"{url}/server_info says nothing of {', '.join(sorted(missing))}")
    if (server["pp_size"], server["dp_size"]) != (1, 1):
        raise ValueError(
            f"the server at {url} has pp_size {server['pp_size']} and dp_size {server['dp_size']}, and SGLang gives "
            "only tensor-parallel ranks a place in a group for weights; start it with both 1, or set fleet.transport "
            "to disk"
        )
