"""The planned bytes are the bytes that engines hold, and what layers keep for their backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_orz.config import CriticConfig, DType, ModelConfig, ParallelConfig
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.memory import kv_cache_bytes, layer_activations, model_memory
from megatron_orz.types import Experience
from tests.engine import tiny
from tests.engine.layouts import OPTIMIZER, Layout, packs_of_rank, policy_loss, value_loss
from tests.launch import RankPool

pytestmark = pytest.mark.usefixtures("one_thread")

# Flat buffers start every parameter at a multiple of 64 elements and end at one of 128 for every rank.
PADDING_PER_PARAMETER = 64 * 4
PADDING_PER_BUFFER = 4 * 128 * 4

LAYOUTS = [
    Layout(tp=2, tied=True),
    Layout(pp=2, tied=True, chunk_layers=(1, 3)),
    Layout(pp=2, vpp=2),
    Layout(dp=2),
    Layout(cp=2, distributed=False),
    Layout(dp=2, ep=2, family="qwen3_moe"),
    Layout(tp=2, sp=True, family="mixtral"),
]


def num_bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Of storages that several tensors share, counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def check_layout(layout: Layout, path: Path, dtype: DType) -> None:
    """What one rank does: a step of each model, then counts."""
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh
    from megatron_orz.engine.replicas import gradient_buffers

    optimizer = dataclasses.replace(OPTIMIZER, distributed=layout.distributed)
    architecture = read_architecture(path)
    with open_mesh(layout.parallel, seed=0) as mesh:
        packs = packs_of_rank(tiny.random_sequences(12), layout, mesh.dp_rank)
        common: dict[str, Any] = {"path": path, "optimizer": optimizer, "dtype": dtype}
        for engine, loss in (
            (PolicyEngine(ModelConfig(**common), mesh), policy_loss),
            (CriticEngine(CriticConfig(**common), mesh), value_loss),
        ):
            planned = model_memory(
                architecture,
                layout.parallel,
                mesh.pp_rank,
                world_size=layout.world_size,
                pack_tokens=0,
                dtype=dtype,
                recompute="none",
                value_head=engine.name == "critic",
                distributed_optimizer=layout.distributed,
            )
            engine.step(packs, loss)
            parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
            assert sum(p.nbytes for p in parameters) == planned.weights

            gradients = num_bytes(list(gradient_buffers(engine._replicas)))
            slack = PADDING_PER_PARAMETER * len(parameters) + PADDING_PER_BUFFER * layout.vpp * 2
            assert planned.gradients <= gradients <= planned.gradients + slack

            held = {p.untyped_storage().data_ptr() for p in parameters}
            states = [t for t in engine._optimizer.tensors() if t.ndim and t.untyped_storage().data_ptr() not in held]
            # A rank's share ends where its part of the flat buffer does: shares differ, but add up.
            totals = torch.tensor([sum(state.nbytes for state in states), planned.optimizer], dtype=torch.float64)
            dist.all_reduce(totals, group=mesh.dp_cp_group)
            assert totals[0] == pytest.approx(float(totals[1]), abs=2 * mesh.dp_cp_group.size())


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planned_bytes_are_held(layout: Layout, two_ranks: RankPool, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, family=layout.family, tied=layout.tied)
    two_ranks.run(check_layout, layout, tmp_path, "bfloat16")


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_held_by_one_rank(distributed: bool, dtype: DType, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, tied=True)
    check_layout(Layout(distributed=distributed), tmp_path, dtype)


def test_optimizer_states_are_shared_by_all_data_parallel_ranks(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    architecture = read_architecture(tmp_path)

    def optimizer(world_size: int, **options: Any) -> int:
        return model_memory(
            architecture,
            ParallelConfig(**options),
            0,
            world_size=world_size,
            pack_tokens=0,
            dtype="bfloat16",
            recompute="none",
            value_head=False,
        ).optimizer

    assert optimizer(8) == pytest.approx(optimizer(1) / 8, abs=8)
    assert optimizer(8, cp=4) == optimizer(8)


def saved_bytes(engine: Any, pack: Experience) -> int:
    """What autograd saves during one forward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.step([pack], policy_loss)
    return sum(saved.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral"])
def test_a_layer_keeps_about_what_is_planned(family: str, tmp_path: Path) -> None:
    """Measured as the tensors autograd saves, on top of one layer less.

    The plan counts what the wide tensors of a layer hold; norms' statistics, the rotation and the CPU's dense
    attention, which a flash kernel spares, come on top; the CPU's fused activation keeps a little less of experts.
    """
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    measured = {}
    for num_layers in (2, 3):
        path = tmp_path / str(num_layers)
        tiny.save_model(path, family=family, num_layers=num_layers)
        with open_mesh(ParallelConfig(), seed=0) as mesh:
            engine = PolicyEngine(ModelConfig(path=path, optimizer=OPTIMIZER), mesh)
            pack = tiny.concatenate(tiny.random_sequences(24))
            measured[num_layers] = saved_bytes(engine, pack) / len(pack.tokens)
    architecture = read_architecture(tmp_path / "2")
    planned = layer_activations(architecture, ParallelConfig(), num_bytes=4)
    assert 0.95 * planned < measured[3] - measured[2] < 1.8 * planned


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_the_first_stage_keeps_layers_of_all_micro_batches_under_way(pp: int, vpp: int, tmp_path: Path) -> None:
    """Activations of L (1 + (pp - 1) / (pp vpp)) layers under the interleaved schedule, of L under the plain one
    (Korthikanti et al., 2022)."""
    tiny.config_of("qwen2", num_layers=24).save_pretrained(tmp_path)
    architecture, parallel = read_architecture(tmp_path), ParallelConfig(pp=pp, vpp=vpp)
    planned = model_memory(
        architecture,
        parallel,
        0,
        world_size=pp,
        pack_tokens=100,
        dtype="float32",
        recompute="none",
        value_head=False,
    ).activations
    num_layers = 24 * (1 + (pp - 1) / (pp * vpp)) if vpp > 1 else 24
    assert planned == pytest.approx(100 * num_layers * layer_activations(architecture, parallel, num_bytes=4))


def test_kv_cache_is_that_of_the_definition(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    architecture = read_architecture(tmp_path)  # 4 layers, 2 key-value heads of 16
    assert kv_cache_bytes(architecture, num_tokens=10, server_tp=1) == 10 * 4 * 2 * (2 * 16) * 2
    assert kv_cache_bytes(architecture, num_tokens=10, server_tp=2) == 10 * 4 * 2 * (1 * 16) * 2
    # More servers' ranks than heads: each holds a copy of one.
    assert kv_cache_bytes(architecture, num_tokens=10, server_tp=4) == 10 * 4 * 2 * (1 * 16) * 2
