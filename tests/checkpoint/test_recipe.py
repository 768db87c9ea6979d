"""Which changes of a config leave a run the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_orz.checkpoint.recipe import differences, recipe_of
from megatron_orz.config import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
)
from megatron_orz.types import Prompt

PROMPTS = [Prompt(prompt_id=number, token_ids=[number, 7], answer="1", source="train.jsonl") for number in range(3)]
OPTIMIZER = OptimizerConfig(lr=1e-6)
RECIPE = Config(
    run_dir=Path("run"),
    policy=ModelConfig(path=Path("base"), optimizer=OPTIMIZER),
    critic=CriticConfig(path=Path("base"), optimizer=OPTIMIZER),
    ppo=PPOConfig(num_steps=3),
    sampling=SamplingConfig(max_response_tokens=32),
    data=DataConfig(train=(Path("train.jsonl"),)),
)


@pytest.mark.parametrize(
    "changed",
    [
        replace(RECIPE, run_dir=Path("elsewhere"), fresh=True),
        replace(RECIPE, parallel=ParallelConfig(tp=2, sequence_parallel=True)),
        replace(RECIPE, fleet=FleetConfig(kind="local")),
        replace(RECIPE, checkpoint=CheckpointConfig(interval=3)),
        replace(RECIPE, evaluation=EvaluationConfig(interval=1)),
        replace(RECIPE, reward=RewardConfig(num_workers=7)),
        replace(RECIPE, ppo=replace(RECIPE.ppo, num_steps=9)),
        replace(RECIPE, policy=replace(RECIPE.policy, recompute="full")),
        replace(RECIPE, critic=replace(RECIPE.critic, optimizer=replace(OPTIMIZER, distributed=False))),
    ],
)
def test_how_a_run_is_carried_out_may_change(changed: Config) -> None:
    assert recipe_of(changed, PROMPTS) != recipe_of(RECIPE, PROMPTS)
    assert differences(recipe_of(changed, PROMPTS), recipe_of(RECIPE, PROMPTS)) == []


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (replace(RECIPE, seed=1), "seed is 1, was 0"),
        (replace(RECIPE, ppo=replace(RECIPE.ppo, gamma=0.9)), "ppo.gamma is 0.9, was 1.0"),
        (replace(RECIPE, reward=RewardConfig(timeout_s=1.0)), "reward.timeout_s is 1.0, was 5.0"),
        (
            replace(RECIPE, data=DataConfig(train=(Path("a"), Path("b")))),
            'data.train is ["a", "b"], was ["train.jsonl"]',
        ),
        (
            replace(RECIPE, policy=replace(RECIPE.policy, dtype="bfloat16")),
            'policy.dtype is "bfloat16", was "float32"',
        ),
    ],
)
def test_what_is_learned_may_not(changed: Config, difference: str) -> None:
    assert differences(recipe_of(changed, PROMPTS), recipe_of(RECIPE, PROMPTS)) == [difference]


def test_fields_of_another_version_are_passed_over() -> None:
    assert differences({**recipe_of(RECIPE, PROMPTS), "ppo.new": 1}, {**recipe_of(RECIPE, PROMPTS), "ppo.old": 2}) == []


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[:2], [*PROMPTS[:2], replace(PROMPTS[2], answer="2")], [*PROMPTS[:2], replace(PROMPTS[2], token_ids=[7])]],
)
def test_other_training_data_is_another_recipe(prompts: list[Prompt]) -> None:
    (difference,) = differences(recipe_of(RECIPE, prompts), recipe_of(RECIPE, PROMPTS))
    assert difference.startswith("data.content is ")
