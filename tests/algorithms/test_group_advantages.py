"""Rewards relative to a prompt's other responses, against the formulas written out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.group_advantages import (
    group_centred,
    group_normalised,
    leave_one_out,
    relative_rewards,
)
from tests.algorithms.rollouts import graded

GROUPS = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.3, -0.7], [0.25, 0.5, 1.0]]


def formula_of_grpo(rewards: list[float], i: int) -> float:
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return (rewards[i] - mean) / math.sqrt(variance)


def formula_of_dr_grpo(rewards: list[float], i: int) -> float:
    return rewards[i] - sum(rewards) / len(rewards)


def formula_of_rloo(rewards: list[float], i: int) -> float:
    others = [reward for j, reward in enumerate(rewards) if j != i]
    return rewards[i] - sum(others) / len(others)


PAIRS = [
    (group_normalised, formula_of_grpo),
    (group_centred, formula_of_dr_grpo),
    (leave_one_out, formula_of_rloo),
]


@pytest.mark.parametrize(("function", "formula"), PAIRS)
@pytest.mark.parametrize("rewards", GROUPS)
def test_it_equals_its_formula(
    function: Callable[[Tensor], Tensor], formula: Callable[[list[float], int], float], rewards: list[float]
) -> None:
    advantages = function(torch.tensor(rewards, dtype=torch.float64))
    expected = [formula(rewards, i) for i in range(len(rewards))]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("function", [function for function, _ in PAIRS])
@pytest.mark.parametrize("rewards", [[1.0] * 7, [0.1] * 3, [0.7]])
def test_a_group_that_cannot_be_compared_has_no_advantage(
    function: Callable[[Tensor], Tensor], rewards: list[float]
) -> None:
    # The mean of three times 0.1 is not 0.1.
    assert function(torch.tensor(rewards, dtype=torch.float64)).abs().max() < 1e-9


def test_rewards_are_compared_with_those_of_the_same_prompt() -> None:
    """Of several prompts, whose rollouts lie apart and are not equally many."""
    order = [(7, 1.0), (2, 0.0), (7, 0.0), (2, 1.0), (2, 1.0), (9, 0.5)]
    rollouts = [graded(prompt_id, reward) for prompt_id, reward in order]
    # 7: (1, 0); 2: (0, 1, 1); 9: alone.
    advantages = relative_rewards(rollouts, [reward for _, reward in order], leave_one_out)
    assert advantages == pytest.approx([1.0, -1.0, -1.0, 0.5, 0.5, 0.0])
    # The rewards count that are given, not those of the grades.
    assert relative_rewards(rollouts, [0.0] * 6, leave_one_out) == [0.0] * 6
