"""Paired comparisons against enumeration and against the normal approximation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_orz.evaluation.compare import compare, mcnemar, paired_bootstrap
from megatron_orz.evaluation.records import ItemRecord, ResponseRecord


def record(item: str, *rewards: float) -> ItemRecord:
    responses = tuple(
        ResponseRecord(
            text="",
            num_tokens=1,
            finish_reason="stop",
            reward=reward,
            is_correct=reward > 0,
            is_formatted=True,
            timed_out=False,
            extracted=str(reward),
            vote=0,
        )
        for reward in rewards
    )
    return ItemRecord(item=item, place=f"file: line {item}", kind="math", problem="p", answer="1", responses=responses)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (3, 2), (4, 4), (1, 8)])
def test_mcnemar_equals_the_enumeration_of_all_flips(gained: int, lost: int) -> None:
    total = gained + lost
    outcomes = [sum(flips) for flips in itertools.product([0, 1], repeat=total)]
    as_uneven = sum(abs(outcome - total / 2) >= abs(gained - total / 2) for outcome in outcomes)
    assert mcnemar(gained, lost) == pytest.approx(as_uneven / len(outcomes))


def test_the_bootstrap_agrees_with_the_central_limit_theorem() -> None:
    differences = np.random.default_rng(3).choice([-1.0, -0.25, 0.0, 0.5, 1.0], size=600)
    result = paired_bootstrap(differences)
    error = differences.std() / np.sqrt(len(differences))
    assert result.value == pytest.approx(differences.mean())
    # 10,000 resamples know a 2.5 % quantile to about 2 % of the standard error.
    assert result.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.08 * error)
    assert result.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.08 * error)
    assert paired_bootstrap(differences) == result


def test_flips_scores_and_unmatched_items() -> None:
    first = [record("a", 1, 1), record("b", 0, 0), record("c", 1, 0), record("d", 1, 1), record("only", 1, 1)]
    second = [record("d", 0, 0), record("c", 1, 1), record("b", 1, 1), record("a", 1, 1)]
    result = compare("sums", first, second)
    assert (result.num_items, result.num_unmatched) == (4, 1)
    assert (result.first, result.second) == (pytest.approx(2.5 / 4), pytest.approx(3 / 4))
    assert result.difference.value == pytest.approx(0.5 / 4)
    assert [item.item for item in result.gained] == ["b", "c"]
    assert [item.item for item in result.lost] == ["d"]
    assert result.p_value == 1.0


def test_evaluations_of_other_items_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="no item in common"):
        compare("sums", [record("a", 1)], [record("b", 1)])
