"""Weights between Hugging Face checkpoints and Megatron shards, in both directions, one tensor at a time.

A table (`weight_table`) says for every Megatron parameter which Hugging Face tensors it is made of and how they are
joined and cut. Loading reads only the tensors this rank holds a part of; exporting yields whole tensors on every rank.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.model import HeadlessGPTModel, ValueHead
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.stages import stage_of_layer
from megatron_orz.types import NamedWeights


class Layout(ABC):
    """How Hugging Face tensors form one Megatron parameter, and how that is cut over tensor-parallel ranks."""

    @abstractmethod
    def join(self, parts: list[Tensor], tp: int) -> Tensor:
        """Hugging Face tensors -> the whole Megatron parameter."""

    @abstractmethod
    def split(self, whole: Tensor) -> list[Tensor]:
        """The whole Megatron parameter -> Hugging Face tensors."""

    @abstractmethod
    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        """The part each tensor-parallel rank holds."""

    @abstractmethod
    def unshard(self, shards: list[Tensor]) -> Tensor:
        """The inverse of `shards`."""


class Replicated(Layout):
    """Whole on every tensor-parallel rank: norms."""

    def join(self, parts: list[Tensor], tp: int) -> Tensor:
        return parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole]

    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        return [whole] * tp

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True, kw_only=True)
class Cut(Replicated):
    """Cut along one dimension: 0 for column-parallel weights, 1 for row-parallel ones."""

    dim: int = 0

    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        return list(whole.chunk(tp, dim=self.dim))

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=self.dim)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Cut):
    """Rows of the vocabulary, padded with zeros to a multiple of tp."""

    num_rows: int

    def join(self, parts: list[Tensor], tp: int) -> Tensor:
        padding = -parts[0].shape[0] % tp
        return torch.nn.functional.pad(parts[0], (0, 0, 0, padding)) if padding else parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole[: self.num_rows]]


@dataclass(frozen=True, kw_only=True)
class QueryKeyValue(Cut):
    """q, k and v interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, ...]."""

    num_kv_heads: int
    queries_per_group: int

    def join(self, parts: list[Tensor], tp: int) -> Tensor:
        grouped = [part.view(self.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        grouped = whole.view(self.num_kv_heads, self.queries_per_group + 2, -1, *whole.shape[1:])
        q, k, v = grouped.split([self.queries_per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in (q, k, v)]


@dataclass(frozen=True, kw_only=True)
class GateUp(Cut):
    """The gate and up projections of a gated MLP: every rank holds its rows of both."""

    def join(self, parts: list[Tensor], tp: int) -> Tensor:
        return torch.cat(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.chunk(2))

    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        gate, up = whole.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter, by its name in an undivided model."""

    megatron_name: str
    hf: Mapping[str, tuple[int, ...]]
    """The Hugging Face tensors it is made of, with their shapes."""
    layout: Layout


def weight_table(architecture: Architecture) -> list[Entry]:
    """Every parameter of the language model, in the order of the layers."""
    a = architecture
    hidden, q_size, kv_size = a.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    vocabulary = Vocabulary(num_rows=a.vocab_size)
    qkv = QueryKeyValue(num_kv_heads=a.num_kv_heads, queries_per_group=a.num_heads // a.num_kv_heads)
    embedding = {"model.embed_tokens.weight": (a.vocab_size, hidden)}
    table = [Entry("embedding.word_embeddings.weight", embedding, vocabulary)]
    for layer in range(a.num_layers):
        hf, megatron = f"model.layers.{layer}", f"decoder.layers.{layer}"
        attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        qkv_sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        table += [
            Entry(f"{megatron}.input_layernorm.weight", {f"{hf}.input_layernorm.weight": (hidden,)}, Replicated()),
            Entry(
                f"{megatron}.self_attention.linear_qkv.weight",
                {f"{attention}.{name}_proj.weight": (size, hidden) for name, size in qkv_sizes.items()},
                qkv,
            ),
        ]
        if a.qkv_bias:
            biases = {f"{attention}.{name}_proj.bias": (size,) for name, size in qkv_sizes.items()}
            table.append(Entry(f"{megatron}.self_attention.linear_qkv.bias", biases, qkv))
        table += [
            Entry(
                f"{megatron}.self_attention.linear_proj.weight",
                {f"{attention}.o_proj.weight": (hidden, q_size)},
                Cut(dim=1),
            ),
            Entry(
                f"{megatron}.pre_mlp_layernorm.weight",
                {f"{hf}.post_attention_layernorm.weight": (hidden,)},
                Replicated(),
            ),
            Entry(
                f"{megatron}.mlp.linear_fc1.weight",
                {f"{mlp}.gate_proj.weight": (a.ffn_size, hidden), f"{mlp}.up_proj.weight": (a.ffn_size, hidden)},
                GateUp(),
            ),
            Entry(f"{megatron}.mlp.linear_fc2.weight", {f"{mlp}.down_proj.weight": (hidden, a.ffn_size)}, Cut(dim=1)),
        ]
    table.append(Entry("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}, Replicated()))
    head = embedding if a.tied_embeddings else {"lm_head.weight": (a.vocab_size, hidden)}
    table.append(Entry("output_layer.weight", head, vocabulary))
    return table


class HFCheckpoint:
    """The safetensors files of a Hugging Face checkpoint, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _tensor_files(path)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ValueError when the tensor is missing, damaged or not of this shape."""
        if name not in self.files:
            raise ValueError(f"{self.path} holds no tensor {name}; its config.json asks for it")
        with _open_safetensors(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path}: {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
        return tensor


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the checkpoint again") from error


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{path} holds neither model.safetensors nor its index; save the checkpoint as safetensors")
    with _open_safetensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def load_hf(chunks: Sequence[HeadlessGPTModel], path: Path, architecture: Architecture, mesh: Mesh) -> None:
    """Fills this rank's parameters from a Hugging Face checkpoint; a value head keeps its own.

    Raises ValueError when the checkpoint does not hold exactly what the architecture asks for.
    """
    checkpoint = HFCheckpoint(path)
    known = {name for entry in weight_table(architecture) for name in entry.hf}
    if architecture.tied_embeddings:
        known.add("lm_head.weight")
    if unknown := sorted(name for name in checkpoint.files if name not in known and "rotary_emb" not in name):
        raise ValueError(f"{path} holds {len(unknown)} tensors its config.json does not account for, e.g. {unknown[0]}")
    has_value_head = isinstance(getattr(chunks[-1], "output_layer", None), ValueHead)
    parameters = global_parameters(chunks)
    if has_value_head:
        del parameters["output_layer.weight"]
    for entry in weight_table(architecture):
        parameter = parameters.pop(entry.megatron_name, None)
        if parameter is None:
            continue
        whole = entry.layout.join([checkpoint.read(name, shape) for name, shape in entry.hf.items()], mesh.tp)
        with torch.no_grad():
            parameter.copy_(entry.layout.shards(whole, mesh.tp)[mesh.tp_rank])
        if isinstance(entry.layout, Cut):
            _mark_as_shard(parameter, entry.layout.dim)
    assert not parameters, f"parameters without a Hugging Face counterpart: {list(parameters)}"


def _mark_as_shard(parameter: torch.nn.Parameter, dim: int) -> None:
    """Tells the gradient norm that each tensor-parallel rank holds another part of this parameter.

    megatron-core does so only while it draws initial weights (`tensor_parallel/layers.py`,
    `_initialize_affine_weight_cpu`); unmarked, all but the first rank's part drops out of the norm in silence.
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def hf_weights(chunks: Sequence[HeadlessGPTModel], architecture: Architecture, mesh: Mesh) -> NamedWeights:
    """The whole weights under Hugging Face names, on every rank, in the order of the layers.

    A collective over the tensor- and pipeline-parallel ranks: every rank must exhaust the iterator. A tied output
    weight is the embedding, and is not yielded again. A tensor may share memory with the live parameter: copy what has
    to outlast the next update.
    """
    parameters = global_parameters(chunks)
    for entry in weight_table(architecture):
        if entry.megatron_name == "output_layer.weight" and architecture.tied_embeddings:
            continue
        owner_stage = _owner_stage(entry.megatron_name, architecture, mesh)
        if mesh.pp_rank == owner_stage:
            whole = _gather(parameters[entry.megatron_name].detach(), entry.layout, mesh)
            tensors = [tensor.contiguous() for tensor in entry.layout.split(whole)]
        else:
            dtype = chunks[0].config.params_dtype
            tensors = [torch.empty(shape, dtype=dtype, device=mesh.device) for shape in entry.hf.values()]
        for name, tensor in zip(entry.hf, tensors, strict=True):
            if mesh.pp > 1:
                dist.broadcast(tensor, group=mesh.pp_group, group_src=owner_stage)
            yield name, tensor


def _owner_stage(megatron_name: str, architecture: Architecture, mesh: Mesh) -> int:
    if megatron_name.startswith("embedding."):
        return 0
    if megatron_name.startswith("decoder.layers."):
        return stage_of_layer(int(megatron_name.split(".")[2]), architecture.num_layers, mesh.config)
    return mesh.pp - 1


def _gather(shard: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    if mesh.tp == 1 or type(layout) is Replicated:
        return shard
    shards = [torch.empty_like(shard) for _ in range(mesh.tp)]
    dist.all_gather(shards, shard.contiguous(), group=mesh.tp_group)
    return layout.unshard(shards)


def global_parameters(chunks: Sequence[HeadlessGPTModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in an undivided model: layers are numbered over all stages."""
    parameters = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local_layer, rest = name.split(".", 3)
                name = f"decoder.layers.{chunk.decoder.layers[int(local_layer)].layer_number - 1}.{rest}"
            parameters[name] = parameter
    return parameters
