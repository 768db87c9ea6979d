"""A checkpoint or a layout that cannot work is refused by name, before any model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.architecture import Experts, read_architecture
from tests.engine import tiny


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of every family, in a directory of its name."""
    path = tmp_path_factory.mktemp("configs")
    for family in tiny.FAMILIES:
        tiny.config_of(family).save_pretrained(path / family)
    return path


def edited(model_dir: Path, target: Path, **changes: object) -> Path:
    config = json.loads((model_dir / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_architecture_reads_the_config(model_dir: Path) -> None:
    architecture = read_architecture(model_dir)
    assert architecture.num_layers == 4
    assert architecture.head_dim == 16
    assert architecture.qkv_bias
    assert not architecture.tied_embeddings
    assert architecture.padded_vocab_size(2) == 132
    assert architecture.padded_vocab_size(1) == 131


def test_missing_and_malformed_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="model_type 'None' is not one of"):
        read_architecture(tmp_path)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"model_type": "bert"}, "model_type 'bert' is not one of llama, mistral, mixtral, qwen2"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True is not supported, only False"),
        ("mistral", {"sliding_window": 256}, "sliding_window = 256 .* no less than max_position_embeddings 512"),
        ("mixtral", {"sliding_window": 128}, "sliding_window = 128 is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported, only False"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported, only False"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported, only 0.0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported, only 0.0"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 is not supported, only 2 and more"),
        ("qwen2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {'quant_method': 'fp8'}"),
        ("qwen2", {"rope_parameters": YARN}, "rope_type = 'yarn' is not supported, only 'default' and 'llama3'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = 'linear'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported",
        ),
        ("llama", {"num_attention_heads": "four"}, "is not one transformers reads"),
    ],
)
def test_unsupported_options_are_named(
    configs: Path, tmp_path: Path, family: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(edited(configs / family, tmp_path, **changes))


def test_a_sliding_window_that_no_sequence_exceeds_is_none(configs: Path, tmp_path: Path) -> None:
    assert read_architecture(edited(configs / "mistral", tmp_path, sliding_window=512)).max_position == 512


def test_experts_are_read_from_the_config(configs: Path) -> None:
    assert read_architecture(configs / "qwen3").experts is None
    assert read_architecture(configs / "qwen3_moe").experts == Experts(
        num_experts=6, experts_per_token=2, ffn_size=48, renormalise=True, dense_layers=frozenset({1})
    )
    assert read_architecture(configs / "qwen3_moe_unnormalised").experts == Experts(
        num_experts=6, experts_per_token=3, ffn_size=48, renormalise=False, dense_layers=frozenset({0, 2})
    )
    assert read_architecture(configs / "mixtral").experts == Experts(
        num_experts=4, experts_per_token=2, ffn_size=96, renormalise=True, dense_layers=frozenset()
    )


@pytest.mark.parametrize("family", ["qwen2", "llama3", "mistral"])
def test_rotary_frequencies_equal_those_of_transformers(configs: Path, family: str) -> None:
    config = AutoConfig.from_pretrained(configs / family)
    expected = LlamaRotaryEmbedding(config).inv_freq
    assert torch.allclose(read_architecture(configs / family).rope.frequencies(), expected, rtol=1e-6, atol=0)
    if family == "llama3":  # kept, stretched in part, stretched in full
        unscaled = 1000.0 ** -(torch.arange(0, 16, 2) / 16)
        ratio = expected / unscaled
        assert (ratio > 0.999).any()
        assert ((ratio < 0.999) & (ratio > 0.126)).any()
        assert (ratio < 0.126).any()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tp=3), "parallel.tp 3 does not divide the model's 4 attention heads"),
        (ParallelConfig(tp=4), "parallel.tp 4 does not divide the model's 2 key-value heads"),
        (ParallelConfig(ep=2), "parallel.ep 2 deals out experts, but the model has none"),
        (ParallelConfig(pp=5), r"4 layers cannot fill pp\*vpp = 5\*1 chunks"),
        (ParallelConfig(pp=2, vpp=3), r"4 layers cannot fill pp\*vpp = 2\*3 chunks"),
        (ParallelConfig(pp=2, chunk_layers=(2, 3)), "chunk_layers .* adds up to 5, but the model has 4 layers"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(model_dir: Path, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(model_dir).check_layout(parallel)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(ep=4), "parallel.ep 4 does not divide the model's 6 experts"),
        (ParallelConfig(tp=2), "experts on parallel.tp 2 needs parallel.sequence_parallel"),
    ],
)
def test_layouts_that_do_not_fit_experts_are_refused(configs: Path, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(configs / "qwen3_moe").check_layout(parallel)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cp": 0}, "parallel.cp 0 is not at least 1"),
        ({"vpp": 2}, "parallel.vpp 2 interleaves .* it needs parallel.pp > 1"),
        ({"pp": 2, "chunk_layers": (4,)}, r"chunk_layers has 1 entries, but pp\*vpp = 2\*1 chunks need one each"),
        ({"pp": 2, "chunk_layers": (4, 0)}, r"chunk_layers \(4, 0\) leaves a chunk without a layer"),
        ({"sequence_parallel": True}, "it needs parallel.tp > 1"),
    ],
)
def test_grids_that_contradict_themselves_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (ParallelConfig(tp=2), 3, r"world size 3 is not a multiple of tp\*pp\*cp = 2\*1\*1"),
        (ParallelConfig(tp=2, cp=3), 8, r"world size 8 is not a multiple of tp\*pp\*cp = 2\*1\*3"),
        (ParallelConfig(pp=2, ep=4), 4, "parallel.ep 4 does not divide the 2 ranks of a pipeline stage"),
    ],
)
def test_world_size_must_fit_the_grid(parallel: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel.check_world_size(world_size)
