"""A worker extension with faults that can be planted in a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_orz.rollout import vllm_worker
from megatron_orz.rollout.receiving import Update, WeightReceiver
from megatron_orz.rollout.vllm_repack import held_columns, repack

Buckets = Callable[[WeightReceiver, Update], Iterator[list[tuple[str, Tensor]]]]

_BUCKETS: Buckets = WeightReceiver.buckets


class FaultyExtension(vllm_worker.WorkerExtension):
    def plant(self, fault: str) -> None:
        """Takes effect with the next update, until the next call; "" plants nothing."""
        engine = self.weight_transfer_engine
        vllm_worker.repack = _do_nothing if fault == "stale packs" else repack
        engine.finish_weight_update = type(engine).finish_weight_update.__get__(engine)
        WeightReceiver.buckets = _BUCKETS
        if fault.startswith("lose "):
            WeightReceiver.buckets = _losing(fault.removeprefix("lose "))
        if fault.startswith("flip "):
            engine.finish_weight_update = lambda: _finish_and_flip(engine, fault.removeprefix("flip "))

    def load(self, name: str, values: list[list[float]]) -> None:
        """Loads one tensor of an update that has been started."""
        self.weight_transfer_engine.model.load_weights([(name, torch.tensor(values))])


def _do_nothing(model: torch.nn.Module) -> None: ...


def _losing(lost: str) -> Buckets:
    def buckets(self: WeightReceiver, update: Update) -> Iterator[list[tuple[str, Tensor]]]:
        for tensors in _BUCKETS(self, update):
            yield [(name, tensor) for name, tensor in tensors if name != lost]

    return buckets


def _finish_and_flip(engine: vllm_worker.BucketWeightTransferEngine, module: str) -> None:
    """One bit of what the module computes with, also where the kernel keeps it repacked."""
    type(engine).finish_weight_update(engine)
    layer = engine.model.get_submodule(module)
    if not hasattr(layer, "cpu_linear"):
        layer.weight.data.view(torch.int32).view(-1)[-1] ^= 1
        return
    columns = held_columns(layer, "weight", layer.input_size_per_partition)
    weight = torch.cat([some for _, some in columns], dim=1).contiguous()
    weight.view(torch.int32)[5, 7] ^= 1
    layer.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, weight, bias)
