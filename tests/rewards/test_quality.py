"""Shares of formatted and reflective responses."""

import pytest

from megatron_orz.rewards.quality import format_share, mean_correct_tokens, reflection_share
from megatron_orz.types import Grade


def grade(*, is_correct: bool = False, is_formatted: bool = True) -> Grade:
    return Grade(
        reward=float(is_correct), is_correct=is_correct, is_formatted=is_formatted, timed_out=False, extracted=None
    )


def test_reflection_share_counts_responses_with_a_pattern_in_any_case() -> None:
    responses = [
        "Wait, no.",
        "I recheck and retry",
        "HOWEVER, 3",
        "Alternatively, x",
        "wait for it",
        "however it is",
        "",
    ]
    assert reflection_share(responses) == pytest.approx(4 / 7)
    assert reflection_share([]) == 0.0


def test_format_share_counts_extracted_answers() -> None:
    assert format_share([grade(), grade(is_formatted=False), grade(), grade()]) == 0.75
    assert format_share([]) == 0.0


def test_mean_length_of_correct_responses_with_and_without_reflection() -> None:
    responses = ["wait, 3", "3", "wait, 4", "retry 3"]
    grades = [grade(is_correct=True), grade(is_correct=True), grade(), grade(is_correct=True)]
    assert mean_correct_tokens(responses, grades, [10, 40, 1000, 40]) == (25.0, 30.0)
    assert mean_correct_tokens(["wait, 4"], [grade()], [5]) == (0.0, 0.0)
