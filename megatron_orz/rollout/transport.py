"""How new weights reach a live server: in buckets, over a transport, in the order of vLLM's update protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.types import NamedWeights

BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors of one type, laid end to end."""

    names: list[str]
    shapes: list[list[int]]
    dtype: torch.dtype
    payload: Tensor  # [bytes] uint8 on the CPU; valid until the next bucket is asked for


def buckets(weights: NamedWeights, capacity_bytes: int) -> Iterator[Bucket]:
    """Fills one buffer again and again; a tensor larger than `capacity_bytes` gets a bucket of its own."""
    buffer = torch.empty(capacity_bytes, dtype=torch.uint8)
    names: list[str] = []
    shapes: list[list[int]] = []
    dtype, used = torch.uint8, 0
    for name, weight in weights:
        end = used + weight.nbytes
        if names and (weight.dtype != dtype or end > capacity_bytes):
            yield Bucket(names=names, shapes=shapes, dtype=dtype, payload=buffer[:used])
            names, shapes, used, end = [], [], 0, weight.nbytes
        if end > len(buffer):
            buffer = torch.empty(end, dtype=torch.uint8)
        buffer[used:end].view(weight.dtype).view(weight.shape).copy_(weight)
        names.append(name)
        shapes.append(list(weight.shape))
        dtype, used = weight.dtype, end
    if names:
        yield Bucket(names=names, shapes=shapes, dtype=dtype, payload=buffer[:used])


class WeightTransport(Protocol):
    """Moves buckets from the trainer into a server's workers. Each side runs its half of `connect` and `send` at once.

    The workers' half is a backend of vLLM's, chosen by `server_arguments`.
    """

    server_arguments: tuple[str, ...]

    def init_info(self, num_workers: int) -> dict[str, Any]:
        """What the workers need to connect."""
        ...

    def connect(self) -> None:
        """The trainer's half of connecting, after `init_info`."""
        ...

    def update_info(self, bucket: Bucket) -> dict[str, Any]:
        """What the workers need to receive a bucket."""
        ...

    def send(self, bucket: Bucket) -> None:
        """The trainer's half of moving a bucket."""
        ...

    def close(self) -> None:
        """Leaves the workers."""
        ...


class WeightSender:
    """Updates servers over one transport: one broadcast reaches all of them.

    timeout_s: deadline of connecting, and of one whole update.
    """

    def __init__(self, clients: Sequence[VLLMClient], transport: WeightTransport, *, timeout_s: float) -> None:
        self._clients = clients
        self._transport = transport
        self._timeout_s = timeout_s
        self._halves = ThreadPoolExecutor(len(clients) + 1, "weights")

    def connect(self) -> None:
        """Joins the trainer and the workers of every server, which are numbered in the order of the clients."""
        sizes = [int(client.get("/get_world_size")["world_size"]) for client in self._clients]
        init_info = self._transport.init_info(sum(sizes))
        joins = [
            partial(
                client.post,
                "/init_weight_transfer_engine",
                {"init_info": {**init_info, "first_rank": first_rank}},
                timeout_s=self._timeout_s,
            )
            for client, first_rank in zip(self._clients, accumulate(sizes[:-1], initial=1), strict=True)
        ]
        self._exchange(joins, self._transport.connect)

    def send(self, weights: NamedWeights, version: int) -> None:
        """Gives the servers new weights; their later rollouts are of `version`.

        Raises ServerError or RuntimeError; the servers then hold neither the old nor the new weights.
        """
        deadline = time.monotonic() + self._timeout_s

        def posts(path: str, body: dict[str, Any] | None = None, **query: str) -> list[Callable[[], dict[str, Any]]]:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise ServerError(
                    f"a weight update took longer than fleet.update_timeout_s = {self._timeout_s:g} s; raise it"
                )
            return [partial(client.post, path, body, query=query, timeout_s=remaining_s) for client in self._clients]

        def post(path: str, body: dict[str, Any] | None = None, **query: str) -> list[dict[str, Any]]:
            return [half.result() for half in self._started(posts(path, body, **query))]

        # The caches are cleared once, below, where it is seen whether that worked.
        post("/pause", mode="keep", clear_cache="false")
        post("/start_weight_update")
        for bucket in buckets(weights, BUCKET_BYTES):
            update_info = self._transport.update_info(bucket)
            self._exchange(
                posts("/update_weights", {"update_info": update_info}), partial(self._transport.send, bucket)
            )
        post("/finish_weight_update", {"weight_version": str(version)})
        # An update leaves the cached keys and values of the old weights in place.
        if not all(answer["success"] for answer in post("/reset_prefix_cache")):
            raise ServerError("a server could not reset its prefix cache: requests still hold parts of it")
        post("/resume")

    def close(self) -> None:
        """Leaves the workers."""
        self._transport.close()
        self._halves.shutdown(wait=False, cancel_futures=True)

    def _exchange(self, server_halves: Sequence[Callable[[], object]], trainer_half: Callable[[], object]) -> None:
        """Runs all halves at once. The first error is raised without waiting for the other halves, which cannot end
        well alone; their own deadline ends them, or the end of the server."""
        self._started([*server_halves, trainer_half])

    def _started(self, halves: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
        futures = [self._halves.submit(half) for half in halves]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future in done:
                future.result()
        return futures
