"""The repetition score against its definition by sets of substrings, and the mask of repeated tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_orz.metrics import repetition
from megatron_orz.metrics.repetition import repeated_tokens, repetition_scores

RESPONSES = st.lists(st.integers(0, 3), max_size=40)


def score_by_definition(response: list[int]) -> float:
    """1 - distinct substrings / all substrings, every substring written out."""
    n = len(response)
    substrings = [tuple(response[i:j]) for i in range(n) for j in range(i + 1, n + 1)]
    return 1 - len(set(substrings)) / len(substrings) if substrings else 0.0


def repeated_by_definition(response: list[int], min_tokens: int) -> list[bool]:
    """Tokens of every stretch of `min_tokens` that is found at an earlier place, too."""
    is_repeated = [False] * len(response)
    for start in range(len(response) - min_tokens + 1):
        stretch = response[start : start + min_tokens]
        if any(response[u : u + min_tokens] == stretch for u in range(start)):
            is_repeated[start : start + min_tokens] = [True] * min_tokens
    return is_repeated


@given(st.lists(RESPONSES, max_size=7))
def test_the_score_is_the_share_of_substrings_that_were_there_before(responses: list[list[int]]) -> None:
    assert repetition_scores(responses) == pytest.approx(list(map(score_by_definition, responses)), abs=1e-12)


@given(RESPONSES, st.integers(1, 8))
def test_repeated_tokens_are_those_of_stretches_that_were_there_before(response: list[int], min_tokens: int) -> None:
    assert repeated_tokens(response, min_tokens=min_tokens).tolist() == repeated_by_definition(response, min_tokens)


def test_scores_of_known_texts() -> None:
    assert repetition_scores([[], [5], [1, 2, 3, 4], [9] * 99]) == pytest.approx([0, 0, 0, 1 - 2 / 100])
    # 50 new tokens, then 50 of a loop of one: stretches within the loop alone repeat.
    assert repetition_scores([[*range(50), *[99] * 50]]) == pytest.approx([49 * 50 / 2 / (100 * 101 / 2)])


def test_many_responses_are_looked_at_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    responses = [[1, 2] * n for n in range(9)]
    expected = repetition_scores(responses)
    monkeypatch.setattr(repetition, "NUM_TOGETHER", 2)
    assert repetition_scores(responses) == expected
