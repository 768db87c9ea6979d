"""The comparison of repeated tokens with others, against its formula written out and against planted effects."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from megatron_orz.critic_analysis.contrast import Contrast, contrasts
from megatron_orz.critic_analysis.values import ValuedResponse
from tests.critic_analysis.critics import valued

CHANGE, VALUE, ADVANTAGE = range(3)


def random_responses(
    num_prompts: int, *, seed: int = 0, drop: float = 0.0, drift: float = 0.0, late: bool = False
) -> list[ValuedResponse]:
    """Values fall by `drift` over a response, and by `drop` at every repeated token, over noise of prompts and tokens.

    Stretches of repeated tokens lie anywhere, or with `late` in the second half alone.
    """
    rng = np.random.default_rng(seed)
    responses = []
    for prompt_id in range(num_prompts):
        level = rng.normal(scale=0.3)
        for _ in range(4):
            n = int(rng.integers(20, 60))
            is_repeated = np.zeros(n, dtype=bool)
            start = int(rng.integers(n // 2 if late else 0, n - 5))
            is_repeated[start : start + 10] = True
            changes = rng.normal(scale=0.02, size=n) - drift / n - drop * is_repeated
            values = level + np.concatenate([[0.0], changes[:-1].cumsum()])
            responses.append(valued(prompt_id, values.tolist(), is_repeated.tolist(), reward=float(rng.integers(2))))
    return responses


def compare(responses: list[ValuedResponse], seed: int = 0) -> list[Contrast]:
    return contrasts(responses, num_resamples=500, seed=seed)


def matched_by_definition(cells: list[tuple[int, bool, float]]) -> float:
    """sum_s w_s (mean_repeated_s - mean_other_s) of (stratum, is_repeated, x)."""
    differences, weights = [], []
    for stratum in sorted({s for s, _, _ in cells}):
        repeated = [x for s, r, x in cells if s == stratum and r]
        other = [x for s, r, x in cells if s == stratum and not r]
        if repeated and other:
            differences.append(fmean(repeated) - fmean(other))
            weights.append(len(repeated))
    return sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)


def test_every_number_is_what_its_formula_says() -> None:
    responses = random_responses(6, drop=0.05)
    cells: list[list[tuple[int, bool, float]]] = [[], [], []]
    for response in responses:
        n = len(response.values)
        for t in range(n):
            stratum, repeated = 10 * response.generation.is_correct + 10 * t // n, bool(response.is_repeated[t])
            cells[VALUE].append((stratum, repeated, float(response.values[t])))
            cells[ADVANTAGE].append((stratum, repeated, response.generation.reward - float(response.values[t])))
            if t + 1 < n:
                change = float(response.values[t + 1]) - float(response.values[t])
                cells[CHANGE].append((stratum, repeated, change))
    for contrast, of_quantity in zip(compare(responses), cells, strict=True):
        repeated = [x for _, r, x in of_quantity if r]
        other = [x for _, r, x in of_quantity if not r]
        assert (contrast.num_repeated, contrast.num_other) == (len(repeated), len(other))
        assert contrast.repeated == pytest.approx(fmean(repeated), abs=1e-5)
        assert contrast.other == pytest.approx(fmean(other), abs=1e-5)
        assert contrast.difference.value == pytest.approx(fmean(repeated) - fmean(other), abs=1e-5)
        assert contrast.matched.value == pytest.approx(matched_by_definition(of_quantity), abs=1e-5)


def test_a_planted_drop_is_found_and_its_interval_lies_below_zero() -> None:
    change = compare(random_responses(100, drop=0.05))[CHANGE]
    for estimate in (change.difference, change.matched):
        assert estimate.low < -0.05 < estimate.high < 0
        assert estimate.low < estimate.value < estimate.high


def test_values_that_fall_everywhere_are_no_devaluation_of_repetition() -> None:
    """Repetition comes late and values fall all the way: the plain difference is fooled, the matched one is not."""
    value = compare(random_responses(200, drift=1.0, late=True))[VALUE]
    assert value.difference.high < -0.1
    # Within a tenth of a response a little of the fall is left.
    assert abs(value.matched.value) < 0.15 * abs(value.difference.value)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Without an effect, 95 % intervals exclude 0 in 5 % of data sets: of 100, in more than 13 once in 2000 times."""
    num_excluding = 0
    for seed in range(100):
        change = compare(random_responses(30, seed=seed))[CHANGE]
        num_excluding += not change.difference.low <= 0 <= change.difference.high
    assert num_excluding <= 13


def test_an_interval_holds_95_percent_of_the_differences_of_resampled_prompts() -> None:
    """Token by token: prompts are drawn with replacement, each with all its responses."""
    responses = random_responses(12, drop=0.05)
    cells = [
        [
            (bool(repeated), float(value))
            for response in responses
            if response.generation.prompt_id == prompt_id
            for repeated, value in zip(response.is_repeated, response.values, strict=True)
        ]
        for prompt_id in range(12)
    ]
    rng, differences = np.random.default_rng(1), []
    for _ in range(2000):
        drawn = [cell for prompt_id in rng.integers(12, size=12) for cell in cells[prompt_id]]
        differences.append(fmean(x for r, x in drawn if r) - fmean(x for r, x in drawn if not r))
    low, high = np.quantile(differences, [0.025, 0.975])
    found = contrasts(responses, num_resamples=2000, seed=0)[VALUE].difference
    # 2,000 resamples know either end to about 4 % of the width.
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.high - found.low == pytest.approx(high - low, rel=0.15)


def test_intervals_are_over_prompts_and_not_over_tokens() -> None:
    """Responses copied within their prompt add nothing that is new; ten times the prompts do."""

    def width(responses: list[ValuedResponse]) -> float:
        value = compare(responses)[VALUE].difference
        return value.high - value.low

    few = random_responses(20)
    assert width(few * 5) == pytest.approx(width(few))
    assert width(random_responses(200)) < 0.5 * width(few)


def test_the_seed_decides_the_intervals() -> None:
    responses = random_responses(10)
    assert compare(responses, seed=3) == compare(responses, seed=3)
    assert compare(responses, seed=3) != compare(responses, seed=4)


def test_what_cannot_be_estimated_is_nan() -> None:
    one_prompt = compare([valued(1, [0.5, 0.4, 0.1], [False, True, True])])[VALUE]
    assert one_prompt.difference.value == pytest.approx(-0.25)
    assert math.isnan(one_prompt.difference.low)
    nothing_repeated = compare([valued(i, [0.5, 0.4], [False, False]) for i in range(3)])[VALUE]
    assert nothing_repeated.num_repeated == 0
    assert nothing_repeated.other == pytest.approx(0.45)
    assert math.isnan(nothing_repeated.difference.value)
    assert math.isnan(nothing_repeated.matched.high)
    with pytest.raises(ValueError, match="there is no response to analyse"):
        compare([])
