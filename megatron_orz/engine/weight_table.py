"""Every parameter of a model: its Hugging Face tensors with their shapes, and how they are joined and cut.

Built from the tables of `families.py` and the sizes of an `Architecture`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_orz.engine import families
from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.families import FAMILIES, Table


class Layout(ABC):
    """How Hugging Face tensors form one Megatron parameter, and how that is cut over tensor-parallel ranks."""

    is_stack: ClassVar[bool] = True
    """The parameter is the Hugging Face tensors, one after the other."""

    @abstractmethod
    def join(self, parts: list[Tensor]) -> Tensor:
        """Hugging Face tensors -> the whole Megatron parameter."""

    @abstractmethod
    def split(self, whole: Tensor) -> list[Tensor]:
        """The inverse of `join`."""

    @abstractmethod
    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        """The part each tensor-parallel rank holds."""

    @abstractmethod
    def unshard(self, shards: list[Tensor]) -> Tensor:
        """The inverse of `shards`."""


class Replicated(Layout):
    """Whole on every tensor-parallel rank: norms, routers, the value head."""

    def join(self, parts: list[Tensor]) -> Tensor:
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
    """Rows of the vocabulary; over tp ranks, padded with zeros to a multiple of tp."""

    num_rows: int

    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        padding = -whole.shape[0] % tp
        return super().shards(torch.nn.functional.pad(whole, (0, 0, 0, padding)) if padding else whole, tp)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return super().unshard(shards)[: self.num_rows]


@dataclass(frozen=True, kw_only=True)
class QueryKeyValue(Cut):
    """q, k and v interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, ...]."""

    is_stack: ClassVar[bool] = False
    num_kv_heads: int
    queries_per_group: int

    def join(self, parts: list[Tensor]) -> Tensor:
        grouped = [part.view(self.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        grouped = whole.view(self.num_kv_heads, self.queries_per_group + 2, -1, *whole.shape[1:])
        q, k, v = grouped.split([self.queries_per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in (q, k, v)]


@dataclass(frozen=True, kw_only=True)
class GateUp(Cut):
    """The gate and up projections of a gated MLP: every rank holds its rows of both."""

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.chunk(2))

    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        gate, up = whole.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One Megatron parameter, by its name in an undivided model."""

    megatron_name: str
    hf: Mapping[str, tuple[int, ...]]
    """The Hugging Face tensors it is made of, with their shapes."""
    layout: Layout
    layer: int | None = None
    """None outside the layers."""
    expert: int | None = None
    """None for what is not one expert's. Experts are never cut: expert parallelism deals them out whole."""

    @property
    def is_tied(self) -> bool:
        """An output weight that is the embedding: no checkpoint stores it apart."""
        return self.megatron_name == "output_layer.weight" and "model.embed_tokens.weight" in self.hf

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole Megatron parameter."""
        return tuple(self.layout.join([torch.empty(shape, device="meta") for shape in self.hf.values()]).shape)

    def shards(self, whole: Tensor, tp: int) -> list[Tensor]:
        """The part each tensor-parallel rank holds."""
        return [whole] * tp if self.expert is not None else self.layout.shards(whole, tp)


def weight_table(architecture: Architecture, *, value_head: bool) -> list[Entry]:
    """Every parameter of a policy, or of a critic (`value_head`), in the order of the layers."""
    family = FAMILIES[architecture.family]
    rows = _Rows(architecture)
    table = [*rows.of(families.EMBEDDING)]
    for layer in range(architecture.num_layers):
        table += rows.of(family.attention, layer=layer)
        if architecture.experts is None or layer in architecture.experts.dense_layers:
            table += rows.of(family.mlp, layer=layer)
        else:
            assert family.experts is not None
            table += rows.of(family.experts, layer=layer)
    table += rows.of(families.FINAL_NORM)
    if value_head:
        head = families.VALUE_HEAD
    else:
        head = families.TIED_LM_HEAD if architecture.tied_embeddings else families.LM_HEAD
    return [*table, *rows.of(head)]


class _Rows:
    """Fills the sizes of an architecture into the rows of a table."""

    def __init__(self, architecture: Architecture) -> None:
        a, experts = architecture, architecture.experts
        self._num_experts = experts.num_experts if experts else 0
        self._sizes = {
            "one": 1,
            "hidden": a.hidden_size,
            "q": a.num_heads * a.head_dim,
            "kv": a.num_kv_heads * a.head_dim,
            "head": a.head_dim,
            "ffn": a.ffn_size,
            "vocab": a.vocab_size,
            "experts": self._num_experts,
            "expert_ffn": experts.ffn_size if experts else 0,
        }
        self._layouts: dict[families.Cut, Layout] = {
            "whole": Replicated(),
            "columns": Cut(dim=1),
            "vocabulary": Vocabulary(num_rows=a.vocab_size),
            "qkv": QueryKeyValue(num_kv_heads=a.num_kv_heads, queries_per_group=a.num_heads // a.num_kv_heads),
            "gate_up": GateUp(),
        }

    def of(self, table: Table, *, layer: int | None = None) -> Iterator[Entry]:
        megatron_prefix, hf_prefix = (
            ("", "") if layer is None else (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        )
        for name, (cut, tensors) in table.items():
            for expert in range(self._num_experts) if "{expert}" in name else (None,):
                yield Entry(
                    megatron_name=megatron_prefix + name.format(expert=expert),
                    hf={
                        hf_prefix + hf_name.format(expert=expert): tuple(self._sizes[size] for size in sizes.split())
                        for hf_name, sizes in tensors.items()
                    },
                    layout=self._layouts[cut],
                    layer=layer,
                    expert=expert,
                )
