"""Offloading really frees storages, and a run with it equals one without, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.config import DType, ModelConfig
from tests.engine import tiny
from tests.engine.layouts import OPTIMIZER, Layout, packs_of_rank, policy_loss
from tests.launch import RankPool

pytestmark = pytest.mark.usefixtures("one_thread")


def held(engine: Any) -> dict[str, Tensor]:
    """Every tensor that has to survive, by a name."""
    parameters = {name: p.data for i, chunk in enumerate(engine.chunks) for name, p in chunk.named_parameters(str(i))}
    return parameters | {f"optimizer.{i}": tensor.data for i, tensor in enumerate(engine._optimizer.tensors())}


def gradients(engine: Any) -> list[Tensor]:
    return [p.main_grad for chunk in engine.chunks for p in chunk.parameters()]


def check(layout: Layout, path: Path, dtype: DType) -> None:
    """Two engines take the same steps; one of them is offloaded before, between and after."""
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    optimizer = dataclasses.replace(OPTIMIZER, distributed=layout.distributed)
    with open_mesh(layout.parallel, seed=0) as mesh:
        packs = packs_of_rank(tiny.random_sequences(12), layout, mesh.dp_rank)
        lent, plain = (PolicyEngine(ModelConfig(path=path, optimizer=optimizer, dtype=dtype), mesh) for _ in range(2))
        for _ in range(3):
            before = {name: tensor.clone() for name, tensor in held(lent).items()}
            metrics = lent.offload()
            on_device = [t for t in [*held(lent).values(), *gradients(lent)] if t.device == mesh.device]
            assert len(on_device) > 30
            assert {tensor.untyped_storage().nbytes() for tensor in on_device} == {0}
            # Views of one storage are freed once.
            unique = sum(p.numel() * p.element_size() for chunk in lent.chunks for p in chunk.parameters())
            assert metrics["policy/offloaded_gib"] * 2**30 >= unique
            with pytest.raises(RuntimeError, match="the policy is offloaded; call reload"):
                lent.step(packs, policy_loss)
            with pytest.raises(RuntimeError, match="offloaded"):
                lent.infer(packs)
            with pytest.raises(RuntimeError, match="offloaded"):
                lent.hf_weights()

            lent.reload()
            after = held(lent)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
            assert not any(gradient.any() for gradient in gradients(lent))
            assert lent.step(packs, policy_loss) == plain.step(packs, policy_loss)
            for a, b in zip(lent.infer(packs), plain.infer(packs), strict=True):
                assert torch.equal(a, b)
        exported = dict(plain.hf_weights())
        assert all(torch.equal(weight, exported[name]) for name, weight in lent.hf_weights())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path, tied=True)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_offload_changes_nothing(distributed: bool, dtype: DType, model: Path) -> None:
    check(Layout(distributed=distributed), model, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [Layout(dp=2, overlap=True), Layout(tp=2, sp=True), Layout(pp=2, vpp=2), Layout(cp=2)], ids=str
)
def test_offload_changes_nothing_on_two_ranks(layout: Layout, model: Path) -> None:
    pool = RankPool(2)
    try:
        pool.run(check, layout, model, "bfloat16")
    finally:
        pool.close()
