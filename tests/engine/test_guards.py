"""What must not pass in silence: damaged checkpoints, non-finite gradients."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_orz.config import ModelConfig, OptimizerConfig
from megatron_orz.engine.megatron_engine import PolicyEngine
from megatron_orz.engine.parallel import Mesh
from megatron_orz.types import Experience, LossOutput, PolicyOutput
from tests.engine import tiny


def engine(path: Path, mesh: Mesh) -> PolicyEngine:
    return PolicyEngine(ModelConfig(path=path, optimizer=OptimizerConfig(lr=1e-3)), mesh)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "holds no tensor model.layers.2.mlp.up_proj.weight"),
        ("shape", r"model.norm.weight has shape \[63\], config.json asks for \[64\]"),
        ("unknown", "does not account for, e.g. model.layers.0.self_attn.o_proj.bias"),
        ("truncated", "cannot be read"),
        ("absent", "holds neither model.safetensors nor its index"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(
    model_dir: Path, tmp_path: Path, mesh: Mesh, damage: str, message: str
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    if damage == "shape":
        tensors["model.norm.weight"] = torch.ones(63)
    if damage == "unknown":
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(64)
    save_file(tensors, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if damage == "absent":
        file.unlink()
    with pytest.raises(ValueError, match=message):
        engine(broken, mesh)


def test_non_finite_gradients_leave_the_weights_alone_and_stop_the_run_in_the_end(model_dir: Path, mesh: Mesh) -> None:
    policy = engine(model_dir, mesh)
    batch = tiny.random_sequences(1)

    def update(factor: float) -> float:
        def loss(output: PolicyOutput, experience: Experience) -> LossOutput:
            return LossOutput(per_token=output.log_probs * factor, metrics={})

        return policy.step(batch, loss)["policy/skipped_updates"]

    def weights() -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in policy.hf_weights()}

    before = weights()
    assert update(float("nan")) == 1.0
    assert update(float("inf")) == 1.0
    assert all(torch.equal(weight, before[name]) for name, weight in weights().items())

    assert update(1.0) == 0.0
    after = weights()
    assert all(not torch.equal(weight, before[name]) for name, weight in after.items())
    assert all(weight.isfinite().all() for weight in after.values())

    assert update(float("nan")) + update(float("nan")) == 2.0
    with pytest.raises(RuntimeError, match="3 updates in a row are not finite"):
        update(float("nan"))
