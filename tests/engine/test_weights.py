"""Names of parameters: those of TransformerEngine's fused layers lead to the same rows of the table of weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.weight_table import weight_table
from megatron_orz.engine.weights import _unfused
from tests.engine import tiny


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
