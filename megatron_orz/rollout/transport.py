"""How new weights reach a live server: in buckets, over a transport, in the order of vLLM's update protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
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
    """Updates one server over one transport.

    timeout_s: deadline of connecting, and of one whole update.
    """

    def __init__(self, client: VLLMClient, transport: WeightTransport, *, timeout_s: float) -> None:
        self._client = client
        self._transport = transport
        self._timeout_s = timeout_s
        self._halves = ThreadPoolExecutor(2, "weights")

    def connect(self) -> None:
        """Joins the trainer and the server's workers."""
        num_workers = self._client.get("/get_world_size")["world_size"]
        init_info = self._transport.init_info(num_workers)
        join = partial(
            self._client.post, "/init_weight_transfer_engine", {"init_info": init_info}, timeout_s=self._timeout_s
        )
        self._exchange(join, self._transport.connect)

    def send(self, weights: NamedWeights, version: int) -> None:
        """Gives the server new weights; its later rollouts are of `version`.

        Raises ServerError or RuntimeError; the server then holds neither the old nor the new weights.
        """
        deadline = time.monotonic() + self._timeout_s

        def post(path: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise ServerError(
                    f"a weight update took longer than fleet.update_timeout_s = {self._timeout_s:g} s; raise it"
                )
            return self._client.post(path, body, query=query, timeout_s=remaining_s)

        # The caches are cleared once, below, where it is seen whether that worked.
        post("/pause", mode="keep", clear_cache="false")
        post("/start_weight_update")
        for bucket in buckets(weights, BUCKET_BYTES):
            update_info = self._transport.update_info(bucket)
            self._exchange(
                partial(post, "/update_weights", {"update_info": update_info}), partial(self._transport.send, bucket)
            )
        post("/finish_weight_update", {"weight_version": str(version)})
        # An update leaves the cached keys and values of the old weights in place.
        if not post("/reset_prefix_cache")["success"]:
            raise ServerError("the server could not reset its prefix cache: requests still hold parts of it")
        post("/resume")

    def close(self) -> None:
        """Leaves the workers."""
        self._transport.close()
        self._halves.shutdown(wait=False, cancel_futures=True)

    def _exchange(self, server_half: Callable[[], object], trainer_half: Callable[[], object]) -> None:
        """Runs both halves at once. The first error is raised without waiting for the other half, which cannot end
        well alone; its own deadline ends it, or the end of the server."""
        halves = [self._halves.submit(server_half), self._halves.submit(trainer_half)]
        done, _ = wait(halves, return_when=FIRST_EXCEPTION)
        for half in halves:
            if half in done:
                half.result()
