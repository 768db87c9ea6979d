"""The workers' half of a weight update. vLLM imports this module in every worker, before the model is loaded, because
`--worker-extension-cls` names a class in it; nothing of the trainer is imported here.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_orz.rollout.receiving import Offer, Update, WeightReceiver
from megatron_orz.rollout.vllm_held import HeldWeights
from megatron_orz.rollout.vllm_repack import repack


class WorkerExtension:
    """What `/collective_rpc` can call; naming the class also makes vLLM import this module."""

    weight_transfer_engine: BucketWeightTransferEngine
    _weight_update_active: bool
    """vLLM's worker refuses an update while another one has not ended (`v1/worker/gpu_worker.py`)."""

    def meet_trainer(self) -> dict[str, str]:
        """Gives up an update that another trainer has begun, which must be gone. Returns the type of the weights."""
        self._weight_update_active = False
        return {"dtype": str(self.weight_transfer_engine.model_config.dtype).removeprefix("torch.")}

    def weight_digests(self, names: list[str]) -> dict[str, list[dict[str, Any]]]:
        """What the worker's model holds of each Hugging Face tensor: see `HeldWeights.digests`."""
        return self.weight_transfer_engine.held.digests(names)


@dataclass
class InitInfo(Offer, WeightTransferInitInfo):
    """Where the trainer waits."""


@dataclass
class UpdateInfo(Update, WeightTransferUpdateInfo):
    """What the trainer sends."""


class BucketWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives Hugging Face weights bucket by bucket and loads them layer by layer, as from a checkpoint."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held = HeldWeights(self.model)
        self._receiver: WeightReceiver | None = None
        self._needed: Sequence[tuple[torch.nn.Module, str]] = ()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Joins the trainer."""
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = WeightReceiver(init_info, worker, self.device)

    def start_weight_update(self) -> None:
        """Makes every layer ready to be loaded anew: the kernels keep repacked weights, which cannot be overwritten.

        Layers that wait for the rest of an update that was given up would take it from this one: they end theirs first.
        """
        if any(get_layerwise_info(layer).can_load() for layer in self.model.modules()):
            finalize_layerwise_reload(self.model, self.model_config)
        modules = dict(self.model.named_modules())
        paths = [name.rpartition(".") for name, _ in self.model.named_parameters()]
        self._needed = [(modules[module], name) for module, _, name in paths]
        initialize_layerwise_reload(self.model)
        self.held.start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives and loads everything. The base class ends in an accelerator synchronisation, which a CPU lacks."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Hands every bucket to the model's loader."""
        if self._receiver is None:
            raise RuntimeError("no connection to the trainer: /init_weight_transfer_engine comes first")
        for tensors in self._receiver.buckets(update_info):
            with self.held.seen(tensors):
                self.model.load_weights(iter(tensors))
            _keep_unfinished(self.model)
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        """Completes the last layers. Raises when parameters got no new weight, which vLLM only warns of."""
        self.held.finish(self._needed)
        finalize_layerwise_reload(self.model, self.model_config)
        repack(self.model)

    def shutdown(self) -> None:
        """Leaves the trainer."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = None


def _keep_unfinished(model: torch.nn.Module) -> None:
    """Copies what the loader still waits to load out of the bucket, whose memory is used again.

    A layer is loaded when all its tensors are there, which may be buckets later.
    """
    for module in model.modules():
        for _, call in get_layerwise_info(module).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, Tensor) and name != "param":
                    call.arguments[name] = value.clone()


def _die_with_parent() -> None:
    """Ends this process when the one above it dies, even by SIGKILL.

    vLLM's engine process otherwise waits for ever for a killed API server. The supervisor sees to that as well; this
    covers the case that it is killed too (`pkill -9 python` spares the engine, which has another name).
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


_die_with_parent()
WeightTransferEngineFactory.register_engine("megatron_orz", BucketWeightTransferEngine)
