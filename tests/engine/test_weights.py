"""Names of parameters, and where their weights are gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_orz.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.weight_table import weight_table
from megatron_orz.engine.weights import _unfused
from megatron_orz.types import NamedWeights
from tests.conversion.checkpoints import save_policy
from tests.engine import tiny
from tests.launch import run_ranks


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral"])
def test_fused_norms_are_found_in_the_table(family: str, tmp_path: Path) -> None:
    tiny.config_of(family).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    known = {entry.megatron_name for entry in weight_table(architecture, value_head=False)}
    fused = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    if architecture.experts is None:  # before experts the norm is a layer of its own
        fused["pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    for plain, in_projection in fused.items():
        assert _unfused(f"decoder.layers.2.{in_projection}") == f"decoder.layers.2.{plain}"
        assert f"decoder.layers.2.{plain}" in known
    assert {_unfused(name) for name in known} == known


def _gather(path: Path) -> None:
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    with open_mesh(ParallelConfig(pp=2, timeout_s=300), seed=0) as mesh:
        policy = PolicyEngine(ModelConfig(path=path, optimizer=OptimizerConfig(lr=1e-3)), mesh)
        expected = load_file(path / "model.safetensors")
        own = {name for name in expected if "layers.2." in name or "layers.3." in name or name == "model.norm.weight"}
        on_first = expected if mesh.pp_rank == 0 else {name: expected[name] for name in own}
        check(policy.hf_weights(), expected)
        check(policy.hf_weights().on_first_rank(), on_first)
        check(policy.hf_weights().on_first_rank().again(), on_first)
        of_stage = {name: expected[name] for name in (own if mesh.pp_rank else expected.keys() - own)}
        check(policy.hf_weights().of_stage(), of_stage)
        check(policy.hf_weights().of_stage().again(), of_stage)
        check(policy.hf_weights().again(), expected)


def check(weights: NamedWeights, expected: dict[str, Tensor]) -> None:
    gathered = {name: weight.clone() for name, weight in weights}
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in gathered.items())


def test_ranks_get_the_weights_of_all_stages_or_of_their_own(tmp_path: Path) -> None:
    run_ranks(2, _gather, save_policy(tmp_path / "tied", "qwen3"))
