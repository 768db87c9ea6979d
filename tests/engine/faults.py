"""Faults to plant in the engine: each breaks one thing a training backend gets wrong in silence.

A fault is called in every rank before the models are built, and returns how to mend it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_orz.engine import megatron_engine, micro_batches, optimizer, replicas, weights

Mend = Callable[[], None]


def _swap(owner: Any, name: str, make: Callable[[Any], Any]) -> Mend:
    """Puts make(original) in the place of the attribute."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    return lambda: setattr(owner, name, original)


def wrong_shift() -> Mend:
    """Each position is scored on the token after its target."""

    def shift(original: Any) -> Any:
        def of_next_token(batches: Any, *args: Any, **kwargs: Any) -> Any:
            shifted = [replace(batch, targets=batch.targets.roll(-1)) for batch in batches]
            return original(shifted, *args, **kwargs)

        return of_next_token

    return _swap(megatron_engine, "micro_batches", shift)


def gae_across_boundaries() -> Mend:
    """A pack's advantages flow from each sequence into the one before it."""
    from megatron_orz.algorithms import gae

    def join(original: Any) -> Any:
        return lambda rewards, values, cu_seqlens, loss_mask, **kwargs: original(
            rewards, values, cu_seqlens[[0, -1]].contiguous(), loss_mask, **kwargs
        )

    return _swap(gae, "packed_gae", join)


def attention_across_boundaries() -> Mend:
    """A sequence sees those before it in its pack."""

    def join(original: Any) -> Any:
        return lambda cu_seqlens, max_seqlen, **kwargs: original(
            cu_seqlens[[0, -1]].contiguous(), int(cu_seqlens[-1]), **kwargs
        )

    return _swap(micro_batches, "pack_layout", join)


def local_positions() -> Mend:
    """A context-parallel rank counts the positions of its slice from 0."""
    from megatron_orz.engine.context import ContextSlice

    def recount(original: Any) -> Any:
        def cut(self: ContextSlice, batch: Any) -> Any:
            local = original(self, batch)
            return replace(local, position_ids=torch.arange(len(local.tokens)) % batch.max_seqlen)

        return cut

    return _swap(ContextSlice, "cut", recount)


def unreduced_norm() -> Mend:
    """Shards are not known as such, so that the norm counts one tensor-parallel rank's alone."""
    from megatron.core import parallel_state, tensor_parallel

    def forget(original: Any) -> Any:
        return lambda parameter, group=None: parallel_state.get_tensor_model_parallel_rank() == 0

    return _swap(tensor_parallel, "param_is_not_tensor_parallel_duplicate", forget)


def context_factor() -> Mend:
    """megatron-core multiplies the loss by cp, as it does with a loss function that returns a pair."""
    return _returns_a_pair(lambda num_micro_batches: float(num_micro_batches))


def divided_by_micro_batches() -> Mend:
    """megatron-core divides the loss by the number of micro-batches, as it does with a pair."""
    return _returns_a_pair(lambda num_micro_batches: 1.0)


def _returns_a_pair(factor: Callable[[int], float]) -> Mend:
    def wrap(original: Any) -> Any:
        def run(*, forward_step_func: Any, num_microbatches: int, forward_only: bool, **kwargs: Any) -> Any:
            def forward_step(iterator: Any, model: Any) -> Any:
                output, loss_func = forward_step_func(iterator, model)

                def pair(hidden: Tensor) -> Any:
                    loss, _, result = loss_func(hidden)
                    return loss * factor(num_microbatches), result

                return output, pair

            step = forward_step_func if forward_only else forward_step
            return original()(
                forward_step_func=step, num_microbatches=num_microbatches, forward_only=forward_only, **kwargs
            )

        return lambda: run

    return _swap(megatron_engine, "get_forward_backward_func", wrap)


def swapped_tp_slices() -> Mend:
    """The two tensor-parallel ranks load each other's shards."""

    def swap(original: Any) -> Any:
        return lambda chunks, path, architecture, mesh, **kwargs: original(
            chunks, path, architecture, replace(mesh, tp_rank=1 - mesh.tp_rank), **kwargs
        )

    return _swap(weights, "load", swap)


def decayed_norms() -> Mend:
    """Weight decay reaches biases and norms, as it does without megatron-core's scheduler."""

    def decay(original: Any) -> Any:
        def step(self: Any) -> Any:
            for group in self._optimizer.param_groups:
                group["weight_decay"] = self._config.weight_decay
            return original(self)

        return step

    return _swap(optimizer.Optimizer, "step", decay)


def separate_tied_embeddings() -> Mend:
    """The two pipeline stages that hold a tied embedding keep their gradients to themselves."""
    return _swap(_finalize_model_grads(), "_allreduce_word_embedding_grads", _nothing)


def separate_norm_gradients() -> Mend:
    """Under sequence parallelism each rank sees the norms' gradients of its tokens alone."""
    return _swap(_finalize_model_grads(), "_allreduce_non_tensor_model_parallel_grads", _nothing)


def stale_parameters() -> Mend:
    """With overlap, parameters are read before updates have reached every rank."""
    return _swap(megatron_engine, "gather_parameters", _nothing)


def small_buckets() -> Mend:
    """No fault: a gradient bucket for every few parameters, as large models have."""

    def shrink(original: Any) -> Any:
        return lambda **kwargs: original(bucket_size=5_000, **kwargs)

    return _swap(replicas, "DistributedDataParallelConfig", shrink)


def _finalize_model_grads() -> Any:
    """The module; its package has a function of the same name."""
    return importlib.import_module("megatron.core.distributed.finalize_model_grads")


def _nothing(original: Any) -> Callable[..., None]:
    return lambda *args, **kwargs: None
