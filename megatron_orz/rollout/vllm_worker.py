"""The workers' half of the gloo transport. vLLM imports this module in every worker, before the model is loaded,
because `--worker-extension-cls` names a class in it; nothing of the trainer is imported here.
"""

from __future__ import annotations

import ctypes
import signal
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_orz.rollout import gloo
from megatron_orz.rollout.vllm_tied_head import repack_output_head


class WorkerExtension:
    """Adds nothing to the worker: naming it makes vLLM import this module, which registers the backend below."""


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits."""

    port: int
    world_size: int
    timeout_s: float
    first_rank: int
    """Of this server's workers in the group."""


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one bucket, in the order of its bytes."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives Hugging Face weights bucket by bucket and loads them layer by layer, as from a checkpoint."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group: dist.ProcessGroupGloo | None = None
        self._pending: set[str] = set()  # parameters the current update has not brought yet

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the trainer's group."""
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = dist.TCPStore(
            "127.0.0.1",
            init_info.port,
            init_info.world_size,
            is_master=False,
            timeout=timedelta(seconds=init_info.timeout_s),
        )
        self._group = gloo.join(
            store,
            rank=init_info.first_rank + worker,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Makes every layer ready to be loaded anew: the kernels keep repacked weights, which cannot be overwritten."""
        self._pending = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives one bucket. The base class ends in an accelerator synchronisation, which a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receives the bytes and hands the tensors to the model's loader."""
        if self._group is None:
            raise RuntimeError("no connection to the trainer: /init_weight_transfer_engine comes first")
        dtype: torch.dtype = getattr(torch, update_info.dtype)
        sizes = [prod(shape) for shape in update_info.shapes]
        # A fresh buffer for every bucket: the loader keeps views of it until their layer is complete, which may be
        # buckets later.
        payload = torch.empty(sum(sizes) * dtype.itemsize, dtype=torch.uint8)
        gloo.broadcast(self._group, payload)
        tensors = payload.view(dtype).to(self.device).split(sizes)
        loaded = self.model.load_weights(
            (name, tensor.view(shape))
            for name, tensor, shape in zip(update_info.names, tensors, update_info.shapes, strict=True)
        )
        self._pending -= loaded

    def finish_weight_update(self) -> None:
        """Completes the last layers. Raises when parameters got no new weight, which vLLM only warns of."""
        if self._pending:
            raise RuntimeError(f"{len(self._pending)} parameters got no new weight, among them {min(self._pending)}")
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_head(self.model)

    def shutdown(self) -> None:
        """Leaves the group."""
        self._group = None


def _die_with_parent() -> None:
    """Ends this process when the one above it dies, even by SIGKILL.

    vLLM's engine process otherwise waits for ever for a killed API server. The supervisor sees to that as well; this
    covers the case that it is killed too (`pkill -9 python` spares the engine, which has another name).
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


_die_with_parent()
WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
