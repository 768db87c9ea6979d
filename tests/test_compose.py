"""What a config makes of rollouts and packs: algorithms against their papers, written out response by response."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.losses import loss_totals, token_weights
from megatron_orz.compose import compose
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.data.packing import pack
from megatron_orz.types import Experience, PackedBatch, PolicyOutput, Rollout
from tests.algorithms.rollouts import graded

MAX_RESPONSE_TOKENS = 12
OPTIMIZER = OptimizerConfig(lr=1.0)
NO_CRITIC = {"critic": None}


def config(ppo: dict[str, Any], kl: dict[str, Any] | None = None, **fields: Any) -> Config:
    values: dict[str, Any] = {
        "run_dir": Path("run"),
        "policy": ModelConfig(path=Path("model"), optimizer=OPTIMIZER),
        "critic": CriticConfig(path=Path("model"), optimizer=OPTIMIZER),
        "ppo": PPOConfig(**({"num_steps": 5, "num_prompts": 2, "num_responses": 3, "num_critic_updates": 1} | ppo)),
        "kl": KLConfig(**(kl or {})),
        "sampling": SamplingConfig(max_response_tokens=MAX_RESPONSE_TOKENS),
        "data": DataConfig(train=(Path("data"),), max_prompt_tokens=4),
    }
    return Config(**(values | fields))


ROLLOUTS = [
    graded(prompt_id, reward, length=length)
    for prompt_id, reward, length in [(0, 1.0, 3), (0, 0.0, 9), (0, 1.0, 12), (1, 0.0, 1), (1, 0.0, 7), (1, 1.0, 5)]
]


def noise(batch: PackedBatch, seed: int) -> Tensor:
    return -torch.rand(len(batch.tokens), generator=torch.Generator().manual_seed(seed)) * 2


def experience_of(config: Config) -> tuple[PackedBatch, Experience]:
    """One pack of all rollouts, as the loop makes it."""
    algorithm = compose(config)
    (batch,) = pack(ROLLOUTS, algorithm.rewards(ROLLOUTS), max_pack_tokens=100)
    (experience,), _ = algorithm.estimate(
        [batch], [noise(batch, 1)], [torch.zeros(len(batch.tokens))], [noise(batch, 2)]
    )
    return batch, experience


def by_rollout(batch: PackedBatch, x: Tensor) -> dict[int, list[float]]:
    """The response tokens of each rollout; all of them differ in length."""
    spans = [slice(a, b) for a, b in pairwise(batch.cu_seqlens.tolist())]
    return {len(inside): inside.tolist() for span in spans if len(inside := x[span][batch.loss_mask[span]])}


def group_of(rollout: Rollout) -> list[float]:
    return [r.grade.reward for r in ROLLOUTS if r.grade and r.prompt == rollout.prompt]


def loss_of(config: Config, batch: PackedBatch, experience: Experience) -> float:
    """The loss of a policy that has moved from the old one, as the engine weighs it."""
    log_probs = experience.old_log_probs + 0.5 * noise(batch, 3) + 0.5
    output = PolicyOutput(log_probs=log_probs, entropy=-noise(batch, 4))
    per_token = compose(config).policy_loss(output, experience).per_token
    weights = token_weights(batch, config.ppo.loss_mean, loss_totals([batch]), max_response_tokens=MAX_RESPONSE_TOKENS)
    return float((per_token * weights).sum())


def test_grpo_equals_equation_3_of_deepseekmath() -> None:
    """1/G sum_i 1/|o_i| sum_t min(rho A_i, clip(rho) A_i) - beta (ref/pi - log ref/pi - 1), A_i = (r_i - mean)/std."""
    options = {"advantages": "group_normalised", "whiten_advantages": False, "loss_mean": "sequence"}
    recipe = config(options, {"coefficient": 0.04, "reference": Path("model")}, **NO_CRITIC)
    batch, experience = experience_of(recipe)
    old, ref = by_rollout(batch, noise(batch, 1)), by_rollout(batch, noise(batch, 2))
    new = by_rollout(batch, noise(batch, 1) + 0.5 * noise(batch, 3) + 0.5)
    total = 0.0
    for rollout in ROLLOUTS:
        group, n = group_of(rollout), len(rollout.response_ids)
        mean = sum(group) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        assert rollout.grade
        advantage = (rollout.grade.reward - mean) / std
        for t in range(n):
            rho = math.exp(new[n][t] - old[n][t])
            surrogate = min(rho * advantage, min(max(rho, 0.8), 1.2) * advantage)
            kl = math.exp(ref[n][t] - new[n][t]) - (ref[n][t] - new[n][t]) - 1
            total -= (surrogate - 0.04 * kl) / n / len(ROLLOUTS)
    assert loss_of(recipe, batch, experience) == pytest.approx(total, rel=1e-5)


def test_dr_grpo_has_neither_a_std_nor_the_lengths_of_responses() -> None:
    options = {"advantages": "group_centred", "whiten_advantages": False, "loss_mean": "constant"}
    recipe = config(options, **NO_CRITIC)
    batch, experience = experience_of(recipe)
    old, total = by_rollout(batch, noise(batch, 1)), 0.0
    new = by_rollout(batch, noise(batch, 1) + 0.5 * noise(batch, 3) + 0.5)
    for rollout in ROLLOUTS:
        n = len(rollout.response_ids)
        assert rollout.grade
        advantage = rollout.grade.reward - sum(group_of(rollout)) / 3
        for rho in (math.exp(a - b) for a, b in zip(new[n], old[n], strict=True)):
            total -= min(rho * advantage, min(max(rho, 0.8), 1.2) * advantage) / MAX_RESPONSE_TOKENS / len(ROLLOUTS)
    assert loss_of(recipe, batch, experience) == pytest.approx(total, rel=1e-5)


def test_dapo_clips_higher_punishes_length_and_averages_over_tokens() -> None:
    options = {"advantages": "group_normalised", "whiten_advantages": False, "clip_eps_high": 0.28}
    recipe = config(options | {"overlong_tokens": 6}, **NO_CRITIC)
    batch, experience = experience_of(recipe)
    old, total, num_tokens = by_rollout(batch, noise(batch, 1)), 0.0, 0
    new = by_rollout(batch, noise(batch, 1) + 0.5 * noise(batch, 3) + 0.5)

    def reward_of(rollout: Rollout) -> float:
        assert rollout.grade
        over = len(rollout.response_ids) - (MAX_RESPONSE_TOKENS - 6)
        return rollout.grade.reward - max(0, over) / 6

    for rollout in ROLLOUTS:
        group = [reward_of(r) for r in ROLLOUTS if r.prompt == rollout.prompt]
        mean = sum(group) / 3
        advantage = (reward_of(rollout) - mean) / math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        n = len(rollout.response_ids)
        for rho in (math.exp(a - b) for a, b in zip(new[n], old[n], strict=True)):
            total -= min(rho * advantage, min(max(rho, 0.8), 1.28) * advantage)
        num_tokens += n
    assert loss_of(recipe, batch, experience) == pytest.approx(total / num_tokens, rel=1e-5)


def test_a_penalty_in_the_rewards_reaches_every_token_before_it() -> None:
    """RLOO with the KL divergence in the reward: A_t = leave-one-out - beta sum_{s >= t} log pi/ref."""
    options = {"advantages": "leave_one_out", "whiten_advantages": False, "loss_mean": "constant"}
    kl = {"coefficient": 0.1, "reference": Path("model"), "estimator": "k1", "place": "reward"}
    batch, experience = experience_of(config(options, kl, **NO_CRITIC))
    old, ref = by_rollout(batch, noise(batch, 1)), by_rollout(batch, noise(batch, 2))
    advantages = by_rollout(batch, experience.advantages)
    for rollout in ROLLOUTS:
        n, group = len(rollout.response_ids), group_of(rollout)
        assert rollout.grade
        baseline = (sum(group) - rollout.grade.reward) / 2
        for t in range(n):
            divergence = sum(old[n][s] - ref[n][s] for s in range(t, n))
            assert advantages[n][t] == pytest.approx(rollout.grade.reward - baseline - 0.1 * divergence, abs=1e-5)


def test_the_entropy_bonus_is_taken_from_the_loss() -> None:
    recipe = config({})
    batch, experience = experience_of(recipe)
    bonus = replace(recipe, ppo=replace(recipe.ppo, entropy_coefficient=0.01))
    mean_entropy = float(-noise(batch, 4)[batch.loss_mask].mean())
    difference = loss_of(bonus, batch, experience) - loss_of(recipe, batch, experience)
    assert difference == pytest.approx(-0.01 * mean_entropy, rel=1e-3)


@pytest.mark.parametrize(
    ("ppo", "kl", "needed"),
    [
        ({}, {}, False),
        ({"entropy_coefficient": 0.01}, {"coefficient": 0.1, "place": "loss"}, False),
        ({}, {"coefficient": 0.1, "place": "reward"}, True),
        ({}, {"coefficient": 0.0, "place": "reward"}, False),
        ({"importance_cap": 2.0}, {}, True),
        ({"num_policy_updates": 2}, {}, True),
    ],
)
def test_the_old_policy_is_asked_where_more_than_its_only_update_needs_it(
    ppo: dict[str, Any], kl: dict[str, Any], needed: bool
) -> None:
    assert compose(config(ppo, kl | {"reference": Path("model")})).needs_old_log_probs == needed


def test_a_reference_is_watched_wherever_its_penalty_is() -> None:
    for place in ("loss", "reward"):
        kl = {"coefficient": 0.1, "reference": Path("model"), "place": place}
        recipe = config({}, kl)
        _, experience = experience_of(recipe)
        output = PolicyOutput(log_probs=experience.old_log_probs, entropy=experience.old_log_probs)
        assert "policy/reference_kl" in compose(recipe).policy_loss(output, experience).metrics
    assert "policy/reference_kl" not in compose(config({})).policy_loss(output, experience).metrics


@pytest.mark.parametrize(
    ("ppo", "kl", "fields", "expected"),
    [
        (
            {"advantages": "group_normalised", "num_responses": 1},
            {},
            NO_CRITIC,
            r"ppo\.advantages group_normalised compares the responses .*, but ppo\.num_responses is 1; raise .*",
        ),
        ({}, {}, NO_CRITIC, r"ppo\.advantages gae needs the values of a critic, but critic is None; set critic to .*"),
        (
            {},
            {"coefficient": 0.1},
            {},
            r"kl\.coefficient 0\.1 measures the .*, but there is none; set kl\.reference .*",
        ),
        ({}, {"coefficient": -0.1}, {}, r"kl\.coefficient -0\.1 is negative; 0 turns the penalty off"),
        ({}, {"refresh": 0}, {}, r"kl\.refresh 0 is neither never, nor epoch, nor at least 1 step"),
        (
            {"advantages": "group_centred", "value_gae_lambda": 0.9},
            {},
            NO_CRITIC,
            r"ppo\.value_gae_lambda 0\.9 needs the values of a critic, which .* has none of; leave it at None, or .*",
        ),
        ({"advantages": "group_centred", "gae_lambda": 0.9}, {}, NO_CRITIC, r"ppo\.gae_lambda 0\.9 needs .* at 1\.0.*"),
        ({"advantages": "leave_one_out", "gae_alpha": 0.1}, {}, NO_CRITIC, r"ppo\.gae_alpha 0\.1 needs the values .*"),
        (
            {"advantages": "leave_one_out", "num_critic_warmup_steps": 1},
            {},
            NO_CRITIC,
            r"ppo\.num_critic_warmup_steps 1 needs the values of a critic, .*",
        ),
        ({"gae_alpha": 0.1, "gae_lambda": 0.9}, {}, {}, r"ppo\.gae_alpha 0\.1 makes lambda .*; set one of them"),
        ({"gae_alpha": 0.0}, {}, {}, r"ppo\.gae_alpha 0\.0 is not positive"),
        ({"value_gae_lambda": 1.5}, {}, {}, r"ppo\.value_gae_lambda 1\.5 is outside \[0, 1\]"),
        ({"num_critic_warmup_steps": 5}, {}, {}, r"ppo\.num_critic_warmup_steps 5 leaves the policy none of the 5 .*"),
        (
            {"overlong_tokens": 12},
            {},
            {},
            r"ppo\.overlong_tokens 12 leaves nothing of sampling\.max_resp.*",
        ),
        ({"clip_eps_high": 0.0}, {}, {}, r"ppo\.clip_eps_high 0\.0 is not positive"),
        ({"entropy_coefficient": -1.0}, {}, {}, r"ppo\.entropy_coefficient -1\.0 is negative; 0 turns it off"),
    ],
)
def test_what_makes_no_sense_is_refused(
    ppo: dict[str, Any], kl: dict[str, Any], fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"^{expected}$"):
        config(ppo, kl, **fields)


def test_the_critics_updates_do_not_bind_an_algorithm_without_one() -> None:
    few = {"advantages": "group_centred", "num_critic_updates": 100}
    assert config(few, **NO_CRITIC).ppo.num_updates(0) == (0, 1)
    with pytest.raises(ValueError, match="6 rollouts a step cannot be split into 100 mini-batches"):
        config({"num_critic_updates": 100})
