"""Metrics of rollouts whose every number was worked out by hand."""

import math

import pytest

from megatron_orz.metrics.rollouts import lengths_by_answer, rollout_metrics
from megatron_orz.metrics.traits import Traits
from megatron_orz.types import FinishReason, Grade, Prompt, Rollout


def rollout(
    prompt_id: int,
    length: int,
    *,
    is_correct: bool = False,
    is_formatted: bool = True,
    timed_out: bool = False,
    finish_reason: FinishReason = "stop",
) -> Rollout:
    """The reward is 1 for a right answer that stopped."""
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, token_ids=[1], answer="", source="test"),
        response_ids=[0] * length,
        rollout_log_probs=[0.0] * length,
        finish_reason=finish_reason,
        policy_version=0,
        grade=Grade(
            reward=float(is_correct and finish_reason == "stop"),
            is_correct=is_correct,
            is_formatted=is_formatted,
            timed_out=timed_out,
            extracted=None,
        ),
    )


# Prompt 1 is solved by one of three, prompt 2 by none that stopped, prompt 3 by none, prompt 4 by all.
ROLLOUTS = [
    rollout(1, 10, is_correct=True),
    rollout(1, 20),
    rollout(1, 60, finish_reason="length", is_formatted=False),
    rollout(2, 40, is_correct=True, finish_reason="length"),
    rollout(2, 5, timed_out=True),
    rollout(3, 7, finish_reason="abort"),
    rollout(4, 30, is_correct=True),
    rollout(4, 20, is_correct=True),
]
TRAITS = [
    Traits(reflection=("wait,", "retry"), repetition=0.0),
    Traits(reflection=("wait,",), repetition=0.1),
    Traits(reflection=(), repetition=0.9),
    Traits(reflection=("retry",), repetition=0.2),
    Traits(reflection=("however,",), repetition=0.0),
    Traits(reflection=(), repetition=0.0),
    Traits(reflection=("recheck",), repetition=0.4),
    Traits(reflection=(), repetition=0.0),
]


def test_every_metric_is_what_its_name_says() -> None:
    assert rollout_metrics(ROLLOUTS, TRAITS) == pytest.approx(
        {
            "reward/mean": 3 / 8,
            "reward/std": math.sqrt(3 / 8 * 5 / 8),
            "reward/pass@n": 2 / 4,
            "reward/timed_out": 1,
            "response/length_mean": 192 / 8,
            "response/length_max": 60,
            "response/correct_length_mean": (10 + 40 + 30 + 20) / 4,
            "response/wrong_length_mean": (20 + 60 + 5 + 7) / 4,
            "response/correct_reflection_length_mean": (10 + 40 + 30) / 3,
            "response/format_share": 7 / 8,
            "response/truncated_share": 3 / 8,
            "response/repetition_mean": 1.6 / 8,
            "response/reflection_share": 5 / 8,
            "reflection/wait_share": 2 / 8,
            "reflection/recheck_share": 1 / 8,
            "reflection/retry_share": 2 / 8,
            "reflection/alternatively_share": 0,
            "reflection/however_share": 1 / 8,
        }
    )


def test_lengths_are_told_apart_by_the_answer() -> None:
    assert lengths_by_answer(ROLLOUTS) == {"correct": [10, 40, 30, 20], "wrong": [20, 60, 5, 7]}


def test_a_mean_over_no_responses_is_not_a_number() -> None:
    metrics = rollout_metrics(ROLLOUTS[1:2], TRAITS[1:2])
    assert math.isnan(metrics["response/correct_length_mean"])
    assert math.isnan(metrics["response/correct_reflection_length_mean"])
    assert metrics["response/wrong_length_mean"] == 20
