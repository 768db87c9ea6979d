"""The soft over-long penalty against the three branches of its definition."""

from dataclasses import replace

import pytest

from megatron_orz.algorithms.rewards import graded_rewards, overlong_penalty
from tests.algorithms.rollouts import graded


def definition(length: int, longest: int, cache: int) -> float:
    """Equation 13 of the DAPO paper, up to the longest response that can be sampled."""
    if length <= longest - cache:
        return 0.0
    return ((longest - cache) - length) / cache


@pytest.mark.parametrize("cache", [1, 3, 8, 15])
def test_the_penalty_equals_its_definition_at_every_length(cache: int) -> None:
    for length in range(1, 17):
        penalty = overlong_penalty(length, overlong_tokens=cache, max_response_tokens=16)
        assert penalty == pytest.approx(definition(length, 16, cache), abs=1e-15)
    assert overlong_penalty(16, overlong_tokens=cache, max_response_tokens=16) == -1.0


def test_rewards_are_those_of_the_grades_less_the_penalty() -> None:
    rollouts = [graded(0, 1.0, length=4), graded(0, 0.0, length=7), graded(1, 1.0, length=8)]
    assert graded_rewards(rollouts, overlong_tokens=4, max_response_tokens=8) == [1.0, -0.75, 0.0]
    assert graded_rewards(rollouts, overlong_tokens=0, max_response_tokens=8) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"a rollout of prompt 3 is not graded; grade it first"):
        graded_rewards([replace(graded(3, 1.0), grade=None)], overlong_tokens=0, max_response_tokens=8)
