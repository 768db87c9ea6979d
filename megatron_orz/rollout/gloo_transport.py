"""The gloo transport, the trainer's half: buckets through the CPU's memory, wherever the models live."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist

from megatron_orz.rollout import gloo
from megatron_orz.rollout.transport import Bucket


class GlooTransport:
    """A broadcast from the trainer to the workers of one server on this machine.

    timeout_s: deadline of every single wait.
    """

    server_arguments: tuple[str, ...] = (
        *("--worker-extension-cls", "megatron_orz.rollout.vllm_worker.WorkerExtension"),
        *("--weight-transfer-config", json.dumps({"backend": "gloo"})),
    )

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroupGloo | None = None
        self._world_size = 0

    def init_info(self, num_workers: int) -> dict[str, Any]:
        """Opens the meeting point."""
        self._world_size = gloo.FIRST_WORKER_RANK + num_workers
        self._store = gloo.listen(world_size=self._world_size, timeout_s=self._timeout_s)
        return {"port": self._store.port, "world_size": self._world_size, "timeout_s": self._timeout_s}

    def connect(self) -> None:
        """Joins the group as its first rank."""
        assert self._store is not None, "init_info comes first"
        self._group = gloo.join(
            self._store, rank=gloo.TRAINER_RANK, world_size=self._world_size, timeout_s=self._timeout_s
        )

    def update_info(self, bucket: Bucket) -> dict[str, Any]:
        """Names, shapes and the type; the sizes follow from them."""
        return {"names": bucket.names, "shapes": bucket.shapes, "dtype": str(bucket.dtype).removeprefix("torch.")}

    def send(self, bucket: Bucket) -> None:
        """Broadcasts the bytes."""
        assert self._group is not None, "connect comes first"
        gloo.broadcast(self._group, bucket.payload)

    def close(self) -> None:
        """Drops the group and the meeting point."""
        self._group = self._store = None
