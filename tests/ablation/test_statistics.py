"""Statistics of few seeds, against numbers worked out by hand and a printed table."""

from __future__ import annotations

import math

import pytest

from megatron_orz.ablation.statistics import paired_difference, standard_error, student_t


@pytest.mark.parametrize(
    ("num_freedoms", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228)]
)
def test_student_t_is_that_of_the_tables(num_freedoms: int, t: float) -> None:
    assert student_t(num_freedoms) == pytest.approx(t, abs=5e-4)


def test_student_t_with_other_confidence_and_with_many_seeds() -> None:
    assert student_t(2, confidence=0.99) == pytest.approx(9.925, abs=5e-4)
    assert student_t(3, confidence=0.9) == pytest.approx(2.353, abs=5e-4)
    assert student_t(10_000) == pytest.approx(1.960, abs=5e-4)


def test_the_standard_error_of_1_2_6() -> None:
    """Mean 3, deviations -2, -1, 3: s^2 = 14 / 2, s / sqrt(3) = sqrt(7 / 3)."""
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(standard_error([1.0]))


def test_differences_are_paired_by_seed() -> None:
    """Differences of seeds 0, 1, 2 are 0.1, 0.2, 0.3: mean 0.2, s 0.1, half width 4.303 * 0.1 / sqrt(3) = 0.2484."""
    values = {2: 0.9, 0: 0.4, 1: 0.7, 8: 0.0}
    baseline = {0: 0.3, 1: 0.5, 2: 0.6, 9: 1.0}
    difference = paired_difference(values, baseline)
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, -0.0484, 0.4484), abs=1e-4)


def test_one_seed_has_no_interval_and_none_no_difference() -> None:
    difference = paired_difference({0: 0.5}, {0: 0.25, 1: 0.0})
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == (0.25, -math.inf, math.inf)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None
