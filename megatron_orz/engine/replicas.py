"""Model chunks wrapped for data parallelism: gradients summed over the ranks that share parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megatron_orz.config import OptimizerConfig
from megatron_orz.engine.model import HeadlessGPTModel
from megatron_orz.engine.parallel import Mesh


def replicate(
    chunks: Sequence[HeadlessGPTModel], mesh: Mesh, optimizer: OptimizerConfig
) -> list[DistributedDataParallel]:
    """Wraps this rank's chunks; float32 gradients, summed during or after the backward pass.

    Optimizer states are shared out where there are ranks to share with: alone, a rank would copy every gradient.
    """
    parallel = mesh.config
    num_sharing = dist.get_world_size(mesh.dp_cp_group)
    if chunks[0].config.num_moe_experts is not None:
        num_sharing = max(num_sharing, parallel_state.get_expert_data_parallel_world_size())
    is_distributed = optimizer.distributed and num_sharing > 1
    config = chunks[0].config
    replicas = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap,
                overlap_param_gather=parallel.overlap and is_distributed,
                use_distributed_optimizer=is_distributed,
            ),
            chunk,
            # Only the first chunk's reduction ends up behind the last backward pass, where small pieces pay.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = _sum_gradients
    if parallel.overlap:
        no_sync = [replica.no_sync for replica in replicas]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return replicas


def _sum_gradients(chunks: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """`finalize_model_grads` without its division by tokens: the loss weights already hold it."""
    finalize_model_grads(chunks, None, **kwargs)


def gather_parameters(replicas: Sequence[DistributedDataParallel]) -> None:
    """Brings updated parameters to every rank where that otherwise waits for the next forward pass.

    What reads parameters without a forward pass would see old values, in silence.
    """
    for replica in replicas:
        if replica.ddp_config.overlap_param_gather:
            replica.start_param_sync(force_sync=True)


def finish_gather(replica: DistributedDataParallel) -> None:
    """Waits for parameters that are still on their way: those of a head applied outside of any module's forward."""
    if replica.ddp_config.overlap_param_gather:
        for group in replica.bucket_groups:
            group.finish_param_sync()


def gradient_buffers(replicas: Sequence[DistributedDataParallel]) -> Iterator[Tensor]:
    """The flat float32 tensors that hold every gradient; nothing in them outlives an update."""
    for replica in replicas:
        for buffer in replica.buffers + replica.expert_parallel_buffers:
            yield buffer.grad_data
