"""The suggested layout fits, and nothing cheaper does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.budget import SERVER_RESIDUE, TRAINER_RESIDUE, update_buckets
from megatron_orz.engine.memory import kv_cache_bytes, num_parameters
from tools.plan import GIB, USABLE_SHARE, Arguments, plans, reasons, suggest

QWEN2_5_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_7B))
    return tmp_path


@pytest.fixture
def architecture(model: Path) -> Architecture:
    return read_architecture(model)


def test_parameters_are_those_of_the_published_model(architecture: Architecture) -> None:
    assert num_parameters(architecture) == 7_615_616_512


@pytest.mark.parametrize(("gpus", "gpu_gib"), [(8, 80.0), (8, 141.0), (16, 80.0), (32, 40.0)])
def test_the_suggestion_is_the_cheapest_that_fits(
    model: Path, architecture: Architecture, gpus: int, gpu_gib: float
) -> None:
    arguments = Arguments(model=model, gpus=gpus, gpu_gib=gpu_gib)
    candidates = plans(architecture, arguments)
    chosen = suggest(candidates, arguments)
    assert chosen is not None
    usable = USABLE_SHARE * gpu_gib * GIB
    assert chosen.training <= usable
    assert all(plan.training > usable for plan in candidates if plan.cost < chosen.cost)
    grid = chosen.parallel
    assert grid.tp * grid.pp * grid.cp * chosen.dp == gpus
    assert grid.tp <= arguments.gpus_per_node
    assert reasons(chosen, candidates, architecture, arguments)[0].startswith(chosen.describe())


def test_a_whole_replica_is_counted_by_hand(model: Path, architecture: Architecture) -> None:
    """On one GPU: 2 bytes of weights, 4 of gradients and 12 of optimizer states for every parameter."""
    (candidate, *_) = (plan for plan in plans(architecture, Arguments(model=model, gpus=1)) if plan.recompute == "full")
    assert candidate.policy.resident == 18 * num_parameters(architecture)
    assert candidate.critic.resident == 18 * num_parameters(architecture, value_head=True)
    # Of a layer only the input stays: 28 layers, 16384 tokens, 3584 features in bfloat16.
    assert candidate.critic.activations > 28 * 16384 * 3584 * 2


def test_what_cannot_fit_is_said(model: Path) -> None:
    command = [sys.executable, "tools/plan.py", "layout", str(model), "--gpus", "1"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: no layout fits 80 GiB; the smallest, dp 1, recompute full, needs" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"packs_per_rank": 0}, "packs_per_rank 0 is not at least 1"), ({"gpu_gib": 0.0}, "gpu_gib 0 is not positive")],
)
def test_bad_arguments_are_named(changes: dict[str, float], message: str, model: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Arguments(model=model, gpus=8, **changes)  # type: ignore[arg-type]


def test_the_page_shows_the_plan_of_the_colocated_recipe_and_its_sums(model: Path, architecture: Architecture) -> None:
    """Each figure of the page is that of the plan, and all moments fit on a GPU of 80 GB."""
    page = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text()
    arguments = Arguments(model=model, gpus=8)
    chosen = suggest(plans(architecture, arguments), arguments)
    assert chosen is not None
    assert chosen.describe() == "tp 4 dp 2, recompute none"
    models = chosen.policy, chosen.critic
    parts = {
        "weights": [memory.weights for memory in models],
        "gradients": [memory.gradients for memory in models],
        "main weights and moments": [memory.optimizer for memory in models],
        "activations": [memory.activations for memory in models],
    }
    for part, (policy, critic) in parts.items():
        assert f"| {part} | {policy / GIB:.2f} | {critic / GIB:.2f} |" in page
    weights, gradients, optimizer = (sum(parts[part]) / GIB for part in list(parts)[:3])
    held = f"{weights:.2f} + {gradients:.2f} + {optimizer:.2f}"
    buckets, residue = update_buckets(architecture, 2) / GIB, SERVER_RESIDUE / GIB
    training = f"{held} + {chosen.policy.activations / GIB:.2f} = {chosen.training / GIB:.1f}, {buckets:.1f} of buckets"
    assert f"while it trains     {training}, {residue:.0f} of a sleeping server" in page
    assert f"sleeping server: {chosen.training / GIB + buckets + residue:.1f}\n" in page
    resident = sum(memory.resident for memory in models) / GIB
    server = num_parameters(architecture) * 2 / GIB
    update = resident + server + buckets + residue
    assert f"during an update    {held} = {resident:.1f}, {server:.1f} of the server's weights" in page
    assert f"{buckets:.1f} of buckets, {residue:.0f} of its rest: {update:.1f}\n" in page
    cache = kv_cache_bytes(architecture, num_tokens=arguments.kv_tokens, server_tp=1) / GIB
    generation = server + cache + buckets + TRAINER_RESIDUE / GIB
    assert f"{cache:.1f} for the keys and values of {arguments.kv_tokens} tokens" in page
    assert f"of the offloaded trainer: {generation:.1f}\n" in page
    assert max(chosen.training / GIB + buckets + residue, update, generation) < USABLE_SHARE * 80
