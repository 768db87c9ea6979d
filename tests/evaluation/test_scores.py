"""Scores against their definitions, spelled out over all subsets, and intervals against simulation."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_orz.evaluation.scores import Z_95, estimate, majority_score, pass_at_k, powers_of_two


@pytest.mark.parametrize("num_responses", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(num_responses: int) -> None:
    for num_correct in range(num_responses + 1):
        responses = [index < num_correct for index in range(num_responses)]
        for k in range(1, num_responses + 1):
            subsets = list(itertools.combinations(responses, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_responses, num_correct, k) == pytest.approx(expected)


def test_pass_at_k_is_unbiased() -> None:
    p, n, k = 0.3, 6, 3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_more_responses_than_there_are_cannot_be_passed() -> None:
    for k in (0, 5):
        with pytest.raises(ValueError, match="cannot be estimated from 4"):
            pass_at_k(4, 2, k)


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, None]), st.booleans()), min_size=1, max_size=9))
def test_majority_is_the_mean_over_ways_to_break_a_tie(responses: list[tuple[int | None, bool]]) -> None:
    votes = [vote for vote, _ in responses]
    right = {vote: correct for vote, correct in responses if vote is not None}  # of a class, the last one decides
    is_correct = [vote is not None and right[vote] for vote in votes]
    # Sorting the classes by count, over every order in which equals may stand.
    classes = sorted(set(votes) - {None})
    outcomes = [
        right[max(order, key=lambda vote: votes.count(vote))] for order in itertools.permutations(classes) if order
    ]
    assert majority_score(votes, is_correct) == pytest.approx(fmean(outcomes) if outcomes else 0.0)


def wilson(num_successes: int, num_trials: int) -> tuple[float, float]:
    """The roots of |p - successes / trials| = z sqrt(p (1 - p) / trials)."""
    share, z = num_successes / num_trials, Z_95
    roots = np.roots([1 + z**2 / num_trials, -2 * share - z**2 / num_trials, share**2])
    return float(min(roots.real)), float(max(roots.real))


@pytest.mark.parametrize(("num_successes", "num_items"), [(0, 30), (1, 30), (11, 30), (30, 30), (250, 500), (1, 1)])
def test_with_one_response_an_item_the_interval_is_wilsons(num_successes: int, num_items: int) -> None:
    score = estimate([1.0] * num_successes + [0.0] * (num_items - num_successes))
    assert score.value == num_successes / num_items
    assert (score.low, score.high) == pytest.approx(wilson(num_successes, num_items), abs=1e-9)


def test_responses_that_agree_add_nothing_and_independent_ones_do() -> None:
    generator = np.random.default_rng(0)
    solved = generator.random(400) < 0.4
    agreeing = estimate([float(item) for item in solved])
    independent = estimate(list(generator.binomial(16, 0.4, size=400) / 16))
    ratio = (agreeing.high - agreeing.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(4.0, rel=0.1)  # the square root of 16


@pytest.mark.parametrize(("num_items", "num_responses"), [(30, 16), (30, 64), (100, 4), (200, 1)])
@pytest.mark.parametrize("mean", [0.02, 0.5, 0.9])
def test_intervals_hold_the_true_score_as_often_as_they_say(mean: float, num_items: int, num_responses: int) -> None:
    """Items of beta-distributed difficulty, as a benchmark's are. 1,000 draws know the coverage to two points.

    The mean of 30 items at 0.02 is that of a weak model on AIME: most of its draws see a few solved items or none.
    """
    generator = np.random.default_rng(7)
    num_draws = 1000
    difficulty = generator.beta(0.5 * mean, 0.5 * (1 - mean), size=(num_draws, num_items))
    scores = generator.binomial(num_responses, difficulty) / num_responses
    intervals = [estimate(row.tolist()) for row in scores]
    coverage = fmean(interval.low <= mean <= interval.high for interval in intervals)
    assert 0.92 <= coverage <= 0.995


def test_the_ks_worth_a_line() -> None:
    assert [powers_of_two(count) for count in (1, 2, 4, 6, 16)] == [[], [2], [2, 4], [2, 4, 6], [2, 4, 8, 16]]
