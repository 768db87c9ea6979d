"""Weights between checkpoints and Megatron shards, in both directions, one tensor at a time.

Loading reads only the tensors this rank holds a part of; exporting yields whole tensors on every rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.dist_checkpoint import load_torch_dist
from megatron_orz.engine.hf_checkpoint import HFCheckpoint
from megatron_orz.engine.model import HeadlessGPTModel
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.stages import stage_of_layer
from megatron_orz.engine.torch_dist import FUSED_NORMS, is_torch_dist
from megatron_orz.engine.weight_table import Cut, Entry, Layout, Replicated, weight_table
from megatron_orz.types import NamedWeights

Reach: TypeAlias = Literal["all", "first", "own"]
"""The pipeline stages that a tensor gets to."""

NUM_AHEAD = 2
"""Tensors on their way between stages while another one is used."""


def load(
    chunks: Sequence[HeadlessGPTModel], path: Path, architecture: Architecture, mesh: Mesh, *, value_head: bool
) -> None:
    """Fills this rank's parameters from a checkpoint of either form. A collective over all ranks.

    value_head: the model is a critic; its head keeps its own weights where the checkpoint holds none.

    Raises ValueError when the checkpoint does not hold exactly what the architecture asks for.
    """
    parameters = global_parameters(chunks)
    table = [entry for entry in weight_table(architecture, value_head=value_head) if entry.megatron_name in parameters]
    assert len(table) == len(parameters), f"parameters without a checkpoint counterpart: {list(parameters)}"
    for entry in table:
        if isinstance(entry.layout, Cut):
            _mark_as_shard(parameters[entry.megatron_name], entry.layout.dim)
    if is_torch_dist(path):
        load_torch_dist(chunks, path, architecture, value_head=value_head)
        return
    checkpoint = HFCheckpoint(path)
    checkpoint.check_names(architecture, value_head=value_head)
    for entry in table:
        if "score.weight" in entry.hf and not checkpoint.has_value_head:
            continue
        whole = entry.layout.join([checkpoint.read(name, shape) for name, shape in entry.hf.items()])
        with torch.no_grad():
            parameters[entry.megatron_name].copy_(entry.shards(whole, mesh.tp)[mesh.tp_rank])


def _mark_as_shard(parameter: torch.nn.Parameter, dim: int) -> None:
    """Tells the gradient norm that each tensor-parallel rank holds another part of this parameter.

    megatron-core does so only while it draws initial weights (`tensor_parallel/layers.py`,
    `_initialize_affine_weight_cpu`); unmarked, all but the first rank's part drops out of the norm in silence.
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def hf_weights(
    chunks: Sequence[HeadlessGPTModel],
    architecture: Architecture,
    mesh: Mesh,
    *,
    value_head: bool,
    reach: Reach = "all",
) -> NamedWeights:
    """The whole weights under Hugging Face names, in the order of the layers: on every rank (reach: all), on those of
    the first stage, where the others yield their own (first), or on each stage its own.

    A collective over the ranks that share a copy of the model, or (own) a stage of it: every rank must exhaust the
    iterator. A tied output weight is the embedding, and is not yielded again. A tensor may share memory with the live
    parameter: copy what has to outlast the next update.
    """
    parameters = global_parameters(chunks)
    under_way: deque[tuple[str, Tensor, dist.Work | None]] = deque()
    for entry in weight_table(architecture, value_head=value_head):
        if entry.is_tied:
            continue
        owner_stage = _owner_stage(entry, architecture, mesh)
        dtype = chunks[0].config.params_dtype
        if mesh.pp_rank == owner_stage:
            if entry.expert is None:
                whole = _gather(parameters[entry.megatron_name].detach(), entry.layout, mesh)
            else:
                whole = _share_expert(parameters.get(entry.megatron_name), entry, dtype, architecture, mesh)
            tensors = [tensor.contiguous() for tensor in entry.layout.split(whole)]
        elif reach == "all" or (reach == "first" and mesh.pp_rank == 0):
            tensors = [torch.empty(shape, dtype=dtype, device=mesh.device) for shape in entry.hf.values()]
        else:
            continue
        for name, tensor in zip(entry.hf, tensors, strict=True):
            under_way.append((name, tensor, _hop(tensor, owner_stage, mesh, reach)))
            if len(under_way) > NUM_AHEAD:
                yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _hop(tensor: Tensor, owner_stage: int, mesh: Mesh, reach: Reach) -> dist.Work | None:
    """Begins to move a tensor from its stage to all others, or to the first, unless it stays."""
    if mesh.pp == 1 or reach == "own" or (reach == "first" and owner_stage == 0):
        return None
    if reach == "all":
        return dist.broadcast(tensor, group=mesh.pp_group, group_src=owner_stage, async_op=True)
    if mesh.pp_rank == owner_stage:
        return dist.isend(tensor, group=mesh.pp_group, group_dst=0)
    return dist.irecv(tensor, group=mesh.pp_group, group_src=owner_stage)


def _arrived(name: str, tensor: Tensor, hop: dist.Work | None) -> tuple[str, Tensor]:
    if hop is not None:
        hop.wait()
    return name, tensor


def _owner_stage(entry: Entry, architecture: Architecture, mesh: Mesh) -> int:
    if entry.layer is not None:
        return stage_of_layer(entry.layer, architecture.num_layers, mesh.config)
    return 0 if entry.megatron_name.startswith("embedding.") else mesh.pp - 1


def _gather(shard: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    if mesh.tp == 1 or type(layout) is Replicated:
        return shard
    shards = [torch.empty_like(shard) for _ in range(mesh.tp)]
    dist.all_gather(shards, shard.contiguous(), group=mesh.tp_group)
    return layout.unshard(shards)


def _share_expert(
    parameter: torch.nn.Parameter | None, entry: Entry, dtype: torch.dtype, architecture: Architecture, mesh: Mesh
) -> Tensor:
    """An expert's weight, on every rank of its stage. parameter: None where another rank holds this expert."""
    weight = torch.empty(entry.shape, dtype=dtype, device=mesh.device) if parameter is None else parameter.detach()
    if mesh.config.ep > 1:
        assert architecture.experts is not None
        assert entry.expert is not None
        owner = entry.expert * mesh.config.ep // architecture.experts.num_experts
        dist.broadcast(weight, group=parallel_state.get_expert_model_parallel_group(), group_src=owner)
    return weight


def global_parameters(chunks: Sequence[HeadlessGPTModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in an undivided model: layers and experts are numbered over all ranks."""
    parameters = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                layer = chunk.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
            if "local_experts" in parts:
                index = parts.index("local_experts") + 1
                parts[index] = str(layer.mlp.local_expert_indices[int(parts[index])])
            parameters[_unfused(".".join(parts))] = parameter
    return parameters


def _unfused(name: str) -> str:
    """TransformerEngine keeps a norm in the projection after it; the table names it as a layer of its own."""
    for norm, fused in FUSED_NORMS.items():
        name = name.replace(fused, norm)
    return name
