"""The sets: every variant changes what its name says of a recipe, and nothing else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.ablation.plan import make_plan
from megatron_orz.ablation.sets import SETS
from megatron_orz.checkpoint.recipe import leaves
from megatron_orz.command_line import parse
from megatron_orz.config import Config, to_json
from megatron_orz.recipe_file import read_recipe
from tests.test_algorithms import documented

DEMO = read_recipe(Path("examples/demo.py"))

# Set -> variant -> the fields that differ from the demo's, with their values.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "algorithms": {
        "ppo": {},
        "grpo": {
            "ppo.advantages": "group_normalised",
            "ppo.whiten_advantages": False,
            "ppo.loss_mean": "sequence",
            "kl.coefficient": 0.04,
        },
        "rloo": {
            "ppo.advantages": "leave_one_out",
            "ppo.whiten_advantages": False,
            "ppo.loss_mean": "constant",
            "kl.coefficient": 0.01,
            "kl.estimator": "k1",
            "kl.place": "reward",
        },
        "reinforce++": {"ppo.advantages": "group_centred", "kl.coefficient": 0.001, "kl.estimator": "k2"},
        "dr-grpo": {"ppo.advantages": "group_centred", "ppo.whiten_advantages": False, "ppo.loss_mean": "constant"},
        "dapo": {
            "ppo.advantages": "group_normalised",
            "ppo.whiten_advantages": False,
            "ppo.clip_eps_high": 0.28,
            "ppo.overlong_tokens": 16,
            "ppo.max_resampling_rounds": 2,
        },
    },
    "gae-lambda": {"1.0": {}, "0.95": {"ppo.gae_lambda": 0.95}},
    "kl": {
        "none": {},
        "loss": {"kl.coefficient": 0.05},
        "penalty": {"kl.coefficient": 0.05, "kl.estimator": "k1", "kl.place": "reward"},
    },
    "temperature": {"1.0": {}, "0.6": {"sampling.temperature": 0.6}, "1.2": {"sampling.temperature": 1.2}},
    "data-scale": {"all": {}, "128": {"data.max_prompts": 128}, "32": {"data.max_prompts": 32}},
    "updates": {"1": {}, "2": {"ppo.num_policy_updates": 2}, "4": {"ppo.num_policy_updates": 4}},
}


def fields(config: Config) -> dict[str, Any]:
    return leaves(json.loads(to_json(config)))


def test_every_set_is_in_the_table_above() -> None:
    assert {name: list(ablation.variants) for name, ablation in SETS.items()} == {
        name: list(variants) for name, variants in CHANGES.items()
    }


@pytest.mark.parametrize("set_name", SETS)
def test_a_variant_differs_from_the_baseline_in_exactly_its_fields(set_name: str, tmp_path: Path) -> None:
    plan = make_plan(DEMO, sets=[set_name], seeds=[3], output=tmp_path, options=[])
    (baseline,) = plan.of("baseline")
    assert baseline.seed == 3
    for variant, name in plan.sets[set_name].items():
        (run,) = plan.of(name)
        before, after = fields(baseline.config), fields(run.config)
        changes = {field: after[field] for field in after if after[field] != before[field] and field != "run_dir"}
        assert changes == CHANGES[set_name][variant]


def test_the_algorithms_are_those_of_the_documentation() -> None:
    names = {"ppo": "PPO", "reinforce++": "REINFORCE++ with baseline", "dr-grpo": "Dr. GRPO"}
    rows = dict(documented())
    for variant, options in SETS["algorithms"].variants.items():
        assert shlex.split(options) == rows[names.get(variant, variant.upper())]


def test_the_command_line_of_a_run_gives_the_config_that_was_checked(tmp_path: Path) -> None:
    options = ["--fleet.kind", "local", "--ppo.num-prompts", "32"]
    plan = make_plan(DEMO, sets=list(SETS), seeds=[0, 1], output=tmp_path, options=options)
    for run in plan.runs:
        assert parse(DEMO, run.options) == run.config
        assert (run.config.fleet.kind, run.config.ppo.num_prompts) == ("local", 32)
        assert run.config.kl.reference == DEMO.policy.path
