"""Scores of a benchmark and how sure they are: avg@k, pass@k, maj@k with 95 % intervals.

Responses to one item resemble each other, so an item, not a response, is what is drawn at random: every score is a mean
over items, and its interval follows from the spread between items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

Z_95 = 1.959963984540054
"""The standard normal distribution holds 95 % of its weight within this distance of 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A score in [0, 1] and its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """The probability that k of the n responses, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    This is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    if not 1 <= k <= num_responses:
        raise ValueError(f"pass@{k} cannot be estimated from {num_responses} responses; ask for at least {k}")
    return 1.0 - math.comb(num_responses - num_correct, k) / math.comb(num_responses, k)


def majority_score(votes: Sequence[int | None], is_correct: Sequence[bool]) -> float:
    """1 when the answer given most often is right, 0 when it is wrong; among equally frequent ones, the share of right.

    votes: the class of each response's answer, None where it gave none. A class is right when one of its answers is.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    right = {vote for vote, correct in zip(votes, is_correct, strict=True) if correct}
    winners = [vote for vote, count in counts.items() if count == most]
    return sum(vote in right for vote in winners) / len(winners)


def estimate(item_scores: Sequence[float]) -> Estimate:
    """The mean p over n items with its Wilson score interval for clustered observations.

    Wilson's interval of a share p, for as many independent trials as the items are worth: n / agreement, where
    agreement = variance of the item scores / (p (1 - p)) is 1 where the responses to an item are all right or all
    wrong, and 1 / k where k of them are independent. The few items that a hard or an easy benchmark has between 0 and 1
    know little of it: it is averaged with 1, weighted by n 4 p (1 - p) and by a single item. The interval stays inside
    [0, 1], is Wilson's own for one response an item, and keeps its width where all items score 0 or all score 1.
    """
    num_items, mean = len(item_scores), fmean(item_scores)
    spread = mean * (1 - mean)
    agreement = 1.0
    if num_items > 1 and spread > 1e-12:
        weight = 4 * num_items * spread
        agreement = (weight * min(1.0, variance(item_scores, mean) / spread) + 1) / (weight + 1)
    num_trials = num_items / agreement
    scale = 1 / (1 + Z_95**2 / num_trials)
    centre = scale * (mean + Z_95**2 / (2 * num_trials))
    half_width = scale * Z_95 * math.sqrt(spread / num_trials + (Z_95 / (2 * num_trials)) ** 2)
    return Estimate(value=mean, low=max(0.0, centre - half_width), high=min(1.0, centre + half_width))


def powers_of_two(num_responses: int) -> list[int]:
    """2, 4, 8, ... up to the number of responses, and that number: the k of pass@k that are worth a line."""
    return sorted({*(2**power for power in range(1, num_responses.bit_length())), num_responses} - {1})
