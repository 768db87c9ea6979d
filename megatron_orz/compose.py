"""From the options of a config to the functions the loop runs: the one place where algorithms are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from megatron_orz.algorithms import group_advantages, kl
from megatron_orz.algorithms.advantages import AllGather, Estimator, estimate, whiten_advantages
from megatron_orz.algorithms.algorithm import Algorithm, Estimate
from megatron_orz.algorithms.gae import decoupled_gae, length_adaptive_gae
from megatron_orz.algorithms.importance import importance_weights
from megatron_orz.algorithms.losses import ClippedValueLoss, WeightedLosses, entropy_loss, policy_loss
from megatron_orz.algorithms.rewards import graded_rewards
from megatron_orz.config import Config, KLConfig, PPOConfig
from megatron_orz.types import AdvantageKind, Experience, PackedBatch, PolicyLoss, Rollout

RELATIVE: Mapping[AdvantageKind, group_advantages.Relative] = {
    "group_normalised": group_advantages.group_normalised,
    "group_centred": group_advantages.group_centred,
    "leave_one_out": group_advantages.leave_one_out,
}


def compose(config: Config) -> Algorithm:
    """The algorithm a config describes."""
    importance = partial(importance_weights, cap=config.ppo.importance_cap, level=config.ppo.importance_level)
    estimate_all: Estimate = partial(estimate, estimator=_estimator(config.ppo), importance=importance)
    has_penalty_in_rewards = config.kl.coefficient > 0 and config.kl.place == "reward"
    if has_penalty_in_rewards:
        estimate_all = partial(_estimate_with_penalty, config.kl, estimate_all)
    return Algorithm(
        rewards=partial(_rewards, config),
        estimate=estimate_all,
        whiten=whiten_advantages if config.ppo.whiten_advantages else _as_it_is,
        policy_loss=_policy_loss(config.ppo, config.kl),
        value_loss=ClippedValueLoss(config.ppo.value_clip_eps),
        # Importance weights and penalised rewards are known before the update.
        needs_old_log_probs=config.ppo.num_policy_updates > 1
        or config.ppo.importance_cap > 0
        or has_penalty_in_rewards,
    )


def _as_it_is(experience: list[Experience], moments: Tensor, all_gather: AllGather) -> list[Experience]:
    return experience


def _rewards(config: Config, rollouts: Sequence[Rollout]) -> list[float]:
    rewards = graded_rewards(
        rollouts,
        overlong_tokens=config.ppo.overlong_tokens,
        max_response_tokens=config.sampling.max_response_tokens,
    )
    if config.ppo.uses_critic:
        return rewards
    return group_advantages.relative_rewards(rollouts, rewards, RELATIVE[config.ppo.advantages])


def _estimator(ppo: PPOConfig) -> Estimator:
    # Without a critic the values are 0 and gamma = lambda = 1, so that every token gets what its response is credited.
    value_gae_lambda = ppo.gae_lambda if ppo.value_gae_lambda is None else ppo.value_gae_lambda
    if ppo.gae_alpha is not None:
        return partial(length_adaptive_gae, gamma=ppo.gamma, alpha=ppo.gae_alpha, value_gae_lambda=value_gae_lambda)
    return partial(decoupled_gae, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda, value_gae_lambda=value_gae_lambda)


def _estimate_with_penalty(
    options: KLConfig,
    estimate_all: Estimate,
    batches: Sequence[PackedBatch],
    old_log_probs: Sequence[Tensor],
    old_values: Sequence[Tensor],
    ref_log_probs: Sequence[Tensor],
) -> tuple[list[Experience], Tensor]:
    penalise = partial(kl.with_kl_penalty, estimator=options.estimator, coefficient=options.coefficient)
    penalised = [penalise(*pack) for pack in zip(batches, old_log_probs, ref_log_probs, strict=True)]
    return estimate_all(penalised, old_log_probs, old_values, ref_log_probs)


def _policy_loss(ppo: PPOConfig, options: KLConfig) -> PolicyLoss:
    surrogate = partial(policy_loss, clip_eps=ppo.clip_eps, clip_eps_high=ppo.clip_eps_high)
    terms: list[tuple[float, PolicyLoss]] = [(1.0, surrogate)]
    if ppo.entropy_coefficient > 0:
        terms.append((ppo.entropy_coefficient, entropy_loss))
    if options.coefficient > 0:
        in_loss = options.coefficient if options.place == "loss" else 0.0
        terms.append((in_loss, partial(kl.kl_loss, estimator=options.estimator)))
    return WeightedLosses(terms) if len(terms) > 1 else surrogate
