"""Importance weights against explicit loops over tokens and responses."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from megatron_orz.algorithms.importance import importance_weights, log_ratios
from megatron_orz.types import Experience, ImportanceLevel
from tests.algorithms.packs import random_experience

LENGTHS = [(3, 40), (1, 1), (5, 60), (2, 7)]


def off_policy_experience() -> Experience:
    """Ratios on both sides of 1. Prompt tokens have no log-probability by a server: what stands there has no effect."""
    experience = random_experience(LENGTHS)
    noise = torch.randn(len(experience.tokens), generator=torch.Generator().manual_seed(4)) * 0.4
    rollout_log_probs = torch.where(experience.loss_mask, experience.old_log_probs - noise, -1e4)
    return replace(experience, rollout_log_probs=rollout_log_probs)


def expected_ratios(experience: Experience, level: ImportanceLevel) -> list[float]:
    """By the definition, in Python's float64; 1 outside responses."""
    ratios = [1.0] * len(experience.tokens)
    start = 0
    for num_prompt, num_response in LENGTHS:
        tokens = range(start + num_prompt, start + num_prompt + num_response)
        of_token = [
            math.exp(experience.old_log_probs[t].item() - experience.rollout_log_probs[t].item()) for t in tokens
        ]
        for index, token in enumerate(tokens):
            ratios[token] = of_token[index] if level == "token" else math.prod(of_token)
        start += num_prompt + num_response
    return ratios


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_equal_their_definition(level: ImportanceLevel) -> None:
    experience = off_policy_experience()
    ratios = expected_ratios(experience, level)
    cap = statistics.median(set(ratios))  # so that some are above
    weights = importance_weights(experience, experience.old_log_probs, cap=cap, level=level)
    assert weights is not None
    assert weights.tolist() == pytest.approx([min(ratio, cap) for ratio in ratios], rel=1e-4)


def test_without_a_cap_there_are_no_weights() -> None:
    experience = off_policy_experience()
    assert importance_weights(experience, experience.old_log_probs, cap=0.0, level="token") is None


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_hopeless_ratios_stay_finite(level: ImportanceLevel) -> None:
    experience = random_experience(LENGTHS)
    for shift in (200.0, -200.0):
        far = replace(experience, rollout_log_probs=experience.old_log_probs - shift)
        ratios = log_ratios(far, far.old_log_probs, level).exp()
        assert ratios.isfinite().all()
        assert (ratios[experience.loss_mask] > 0).all()


def test_equal_policies_weigh_every_token_by_one() -> None:
    experience = random_experience(LENGTHS)
    same = replace(experience, rollout_log_probs=experience.old_log_probs)
    weights = importance_weights(same, same.old_log_probs, cap=2.0, level="sequence")
    assert weights is not None
    assert (weights == 1).all()
