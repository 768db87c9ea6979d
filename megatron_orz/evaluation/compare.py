"""Two evaluations of the same items, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_orz.evaluation.records import ItemRecord
from megatron_orz.evaluation.scores import Estimate

NUM_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the second evaluation changed. An item is solved when most of its responses are right."""

    name: str
    num_items: int
    """Items that both hold."""
    num_unmatched: int
    """Items that only one of them holds; they are left out."""
    first: float
    second: float
    """Mean scores of the common items."""
    difference: Estimate
    """second - first, with the 95 % interval of the paired bootstrap over items."""
    gained: tuple[ItemRecord, ...]
    """Records of the second for the items that only it solves."""
    lost: tuple[ItemRecord, ...]
    """Records of the second for the items that only the first solves."""
    p_value: float
    """McNemar's exact test: how likely flips as uneven as these are where neither evaluation is the better one."""


def compare(name: str, first: Sequence[ItemRecord], second: Sequence[ItemRecord]) -> Comparison:
    """Compares two sets of records by item. Raises ValueError when they have none in common."""
    before, after = ({record.item: record for record in records} for records in (first, second))
    common = [item for item in before if item in after]
    if not common:
        raise ValueError(f"the two evaluations of {name} have no item in common; compare runs on the same file")
    scores = np.array([[before[item].score, after[item].score] for item in common])  # [items, 2]
    gained = tuple(after[item] for item in common if _is_solved(after[item]) > _is_solved(before[item]))
    lost = tuple(after[item] for item in common if _is_solved(after[item]) < _is_solved(before[item]))
    return Comparison(
        name=name,
        num_items=len(common),
        num_unmatched=len(before) + len(after) - 2 * len(common),
        first=float(scores[:, 0].mean()),
        second=float(scores[:, 1].mean()),
        difference=paired_bootstrap(scores[:, 1] - scores[:, 0]),
        gained=gained,
        lost=lost,
        p_value=mcnemar(len(gained), len(lost)),
    )


def paired_bootstrap(differences: np.ndarray, *, seed: int = 0) -> Estimate:
    """The mean of the differences of items, [items], between the 2.5th and 97.5th percentile of its resamples."""
    generator = np.random.default_rng(seed)
    num_items = len(differences)
    means = np.concatenate(
        [
            differences[generator.integers(num_items, size=(_RESAMPLES_AT_ONCE, num_items))].mean(axis=1)
            for _ in range(NUM_RESAMPLES // _RESAMPLES_AT_ONCE)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(value=float(differences.mean()), low=float(low), high=float(high))


def mcnemar(num_gained: int, num_lost: int) -> float:
    """The two-sided p-value of the flips: under no difference, each goes either way with probability 1/2."""
    num_flips = num_gained + num_lost
    tail = sum(math.comb(num_flips, count) for count in range(min(num_gained, num_lost) + 1))
    return min(1.0, 2 * tail / 2**num_flips)


def _is_solved(record: ItemRecord) -> bool:
    return record.score > 0.5
