"""The recipes for machines that are not here: what a dry run says of them, and what --debug makes of them."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_orz.config import Config, ParallelConfig, to_json
from megatron_orz.debug import scaled_down
from megatron_orz.dry_run import dry_run, plan
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.memory import num_parameters

EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLISHED = EXAMPLES / "models"
LARGE = sorted(path.stem for path in EXAMPLES.glob("orz_*.py") if path.stem != "orz_14m_debug")
USABLE_GIB = 72
"""Of a GPU of 80 GiB."""


def recipe_of(name: str) -> Config:
    recipe = runpy.run_path(str(EXAMPLES / f"{name}.py"))["RECIPE"]
    assert isinstance(recipe, Config)
    return recipe


@pytest.mark.parametrize("path", sorted(PUBLISHED.iterdir()), ids=lambda path: path.name)
def test_parameters_are_counted_as_transformers_has_them(path: Path) -> None:
    """Policy and critic of every published config, against the elements of the models it describes."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
        body = AutoModel.from_config(config)
    architecture = read_architecture(path)
    assert num_parameters(architecture) == policy.num_parameters()
    # The value head is one row, without bias, beside the body.
    assert num_parameters(architecture, value_head=True) == body.num_parameters() + config.hidden_size


@pytest.mark.parametrize("path", sorted(PUBLISHED.iterdir()), ids=lambda path: path.name)
def test_a_published_config_is_of_the_size_in_its_name(path: Path) -> None:
    """`0.5B` in the name: the nearest billion or half of it is not exact, and a wrong width or depth is farther off."""
    billions = float(re.search(r"([\d.]+)B$", path.name)[1])
    assert num_parameters(read_architecture(path)) / 1e9 == pytest.approx(billions, rel=0.09)


@pytest.mark.parametrize("name", LARGE)
def test_a_dry_run_plans_for_the_gpus_of_the_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an empty directory, where neither model nor data are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--dry-run"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    recipe = recipe_of(name)
    assert json.loads(said.out) == json.loads(to_json(recipe)) | {"dry_run": True}
    note, layout, memory, tokens, updates = said.err.splitlines()
    assert note == f"not there, so that tokenizer and data are not checked: {recipe.policy.path}"
    parallel = recipe.parallel
    dp = (parallel.num_ranks or 1) // (parallel.tp * parallel.pp)
    assert layout == f"layout: {parallel.num_ranks} GPUs = tp {parallel.tp} x pp {parallel.pp} x cp 1 x dp {dp}"
    *parts, total = map(float, re.findall(r"\d+\.\d", memory))
    assert total == pytest.approx(sum(parts), abs=0.2)
    assert total < USABLE_GIB
    assert ("critic" in memory) == recipe.ppo.uses_critic
    assert tokens.startswith("tokens of a step: 128 prompts x 64 responses of at most ")
    assert updates == f"updates of a step: 1 of the policy, {12 * recipe.ppo.uses_critic} of the critic"
    assert list(tmp_path.iterdir()) == []


def test_memory_and_packs_are_those_counted_by_hand() -> None:
    """7 B on tp 4 x dp 4: 2 bytes of weights, 4 of gradients, 12 of optimizer states over 4 ranks, for a quarter."""
    recipe = recipe_of("orz_7b")
    architecture = read_architecture(PUBLISHED / "Qwen2.5-7B")
    planned = plan(recipe, {"policy": architecture, "critic": architecture, "reference": architecture}, 16)
    by_hand = num_parameters(architecture) / 4 * (2 + 4 + 12 / 4)
    # Norms and biases are not cut over tp.
    assert planned.models["policy"].resident == pytest.approx(by_hand, rel=1e-3)
    assert planned.models["reference"].resident == pytest.approx(num_parameters(architecture) / 4 * 2, rel=1e-3)
    assert planned.models["reference"].activations == 0
    assert planned.training == sum(m.resident for m in planned.models.values()) + planned.activations
    # A pack holds one sequence of 10047 tokens, and each of 4 ranks has a quarter of 8192.
    said = planned.describe(recipe)
    assert "at most 82,305,024; if all were as long, a rank would have 2,048 packs of 16,384\n" in said


def test_the_copies_of_a_delta_are_counted() -> None:
    """7.616 B parameters of two bytes are 14.2 GiB."""
    recipe, architecture = recipe_of("orz_7b"), read_architecture(PUBLISHED / "Qwen2.5-7B")
    assert "host memory" not in plan(recipe, {"policy": architecture}, 16).describe(recipe)
    changed = replace(recipe, fleet=replace(recipe.fleet, delta=True, transport="gloo"))
    line = "host memory of fleet.delta: 14.2 GiB on every rank that sends weights, and in every worker of"
    assert line in plan(changed, {"policy": architecture}, 16).describe(changed)


def test_a_layout_that_does_not_fit_the_recipe_is_refused() -> None:
    recipe = recipe_of("orz_7b")
    wrong = Config(**{**vars(recipe), "parallel": ParallelConfig(tp=3, num_ranks=16), "dry_run": True})
    with pytest.raises(ValueError, match=r"world size 16 is not a multiple of tp\*pp\*cp = 3\*1\*1; .*"):
        dry_run(wrong, published_models=PUBLISHED)
    wrong = Config(**{**vars(recipe), "parallel": ParallelConfig(tp=8, num_ranks=16), "dry_run": True})
    with pytest.raises(ValueError, match=r"parallel\.tp 8 does not divide the model's 28 attention heads; .*"):
        dry_run(wrong, published_models=PUBLISHED)


@pytest.mark.parametrize("name", LARGE)
def test_debug_scales_a_recipe_down_and_keeps_its_algorithm(name: str) -> None:
    recipe = recipe_of(name)
    small = scaled_down(recipe)
    assert small.parallel == ParallelConfig()
    assert (small.ppo.num_steps, small.ppo.num_prompts, small.ppo.num_responses) == (2, 4, 4)
    assert small.ppo.num_updates(1) == ((1, 1) if recipe.ppo.uses_critic else (0, 1))
    assert small.sampling.max_response_tokens == 128
    assert small.fleet.urls == ()
    assert small.run_dir == recipe.run_dir.with_name(f"{recipe.run_dir.name}-debug")
    for kept in ("advantages", "clip_eps", "loss_mean", "gae_lambda", "whiten_advantages"):
        assert getattr(small.ppo, kept) == getattr(recipe.ppo, kept)
    assert (small.policy, small.critic, small.kl) == (recipe.policy, recipe.critic, recipe.kl)
    assert scaled_down(small).ppo == small.ppo


def test_options_count_after_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["orz_32b.py", "--debug", "--dry-run", "--ppo.num-prompts", "9"])
    runpy.run_path(str(EXAMPLES / "orz_32b.py"), run_name="__main__")
    said = json.loads(capsys.readouterr().out)
    assert (said["ppo"]["num_prompts"], said["ppo"]["num_responses"], said["debug"]) == (9, 4, True)
