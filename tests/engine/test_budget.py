"""Sums for a 7 B model, with its published number of parameters as the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    FleetConfig,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.budget import GIB, SERVER_RESIDUE, check_colocated, moments

NUM_PARAMETERS = 7_615_616_512
QWEN_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def config(path: Path, **fleet: float) -> Config:
    optimizer = OptimizerConfig(lr=1e-6)
    return Config(
        run_dir=path / "run",
        policy=ModelConfig(path=path, optimizer=optimizer, dtype="bfloat16", recompute="full"),
        critic=CriticConfig(path=path, optimizer=optimizer, dtype="bfloat16", recompute="full"),
        ppo=PPOConfig(num_steps=1),
        sampling=SamplingConfig(max_response_tokens=1024),
        data=DataConfig(train=(path / "train.jsonl",), max_prompt_tokens=1024, max_pack_tokens=4096),
        fleet=FleetConfig(colocated=True, max_model_tokens=2048, **{"gpu_memory_share": 0.5, **fleet}),  # type: ignore[arg-type]
    )


@pytest.fixture
def qwen(tmp_path: Path) -> Architecture:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return read_architecture(tmp_path)


def test_the_moments_of_a_step_are_summed(qwen: Architecture, tmp_path: Path) -> None:
    sums = moments(config(tmp_path), qwen, qwen, world_size=8, gpu_bytes=80 * GIB)
    update = sums["during an update"]
    # bfloat16 weights and float32 gradients are whole; an eighth of float32 weights and two moments. The critic has a
    # value head of one row in place of the output weight.
    critic = NUM_PARAMETERS - 151_999 * 3584
    expected = (NUM_PARAMETERS + critic) * (2 + 4 + 12 / 8)
    assert update["trainer"] == pytest.approx(expected, rel=0.01)
    assert update["server's weights"] == 2 * NUM_PARAMETERS
    # The embedding and the head travel in a bucket each.
    buckets = 2 * 152_064 * 3584 * 2
    assert {moment: parts["buckets"] for moment, parts in sums.items()} == dict.fromkeys(sums, buckets)
    assert sum(update.values()) == pytest.approx(expected + 2 * NUM_PARAMETERS + buckets + SERVER_RESIDUE, rel=0.01)
    assert sums["while it trains"]["trainer"] > update["trainer"]
    assert sums["while it generates"]["server"] == 40 * GIB


def test_a_reference_is_the_weights_of_the_policy_once_more(qwen: Architecture, tmp_path: Path) -> None:
    plain = config(tmp_path)
    with_reference = replace(plain, kl=KLConfig(coefficient=0.1, reference=tmp_path))
    without, sums = (moments(c, qwen, qwen, world_size=8, gpu_bytes=80 * GIB) for c in (plain, with_reference))
    for moment in ("while it trains", "during an update"):
        assert sums[moment]["trainer"] - without[moment]["trainer"] == 2 * NUM_PARAMETERS


def test_what_does_not_fit_is_refused_with_its_sums(qwen: Architecture, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GiB of each GPU's 80\.0 GiB .* \(trainer .*\); raise fleet\.server_tp"):
        check_colocated(config(tmp_path), qwen, qwen, world_size=8, gpu_bytes=80 * GIB)
    check_colocated(config(tmp_path), qwen, qwen, world_size=8, gpu_bytes=160 * GIB)
    with pytest.raises(ValueError, match="while it generates"):
        check_colocated(config(tmp_path, gpu_memory_share=0.99), qwen, qwen, world_size=8, gpu_bytes=160 * GIB)


def test_a_share_too_small_for_the_server_is_refused(qwen: Architecture, tmp_path: Path) -> None:
    small = config(tmp_path, gpu_memory_share=0.08)  # 12.8 GiB
    with pytest.raises(ValueError, match=r"12\.8 GiB, too little for the server's weights 14\.2 GiB"):
        check_colocated(small, qwen, qwen, world_size=8, gpu_bytes=160 * GIB)
    halved = replace(small, fleet=replace(small.fleet, server_tp=2))
    check_colocated(halved, qwen, qwen, world_size=8, gpu_bytes=160 * GIB)
