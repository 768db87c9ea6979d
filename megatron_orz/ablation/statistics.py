"""Means over few seeds, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from megatron_orz.evaluation.scores import Estimate

CONFIDENCE = 0.95


def standard_error(values: Sequence[float]) -> float:
    """s / sqrt(n), s the sample standard deviation; nan for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The mean of values[seed] - baseline[seed] over the seeds of both, with Student's 95 % interval.

    Runs of one seed take the same prompts in the same order, so that they are compared with each other. The interval of
    n differences d is mean(d) -+ t s / sqrt(n), t of n - 1 degrees of freedom; from minus to plus infinity for n = 1.
    None where they have no seed in common.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    mean = fmean(differences)
    half_width = math.inf
    if len(differences) > 1:
        half_width = student_t(len(differences) - 1) * standard_error(differences)
    return Estimate(value=mean, low=mean - half_width, high=mean + half_width)


def student_t(num_freedoms: int, *, confidence: float = CONFIDENCE) -> float:
    """The t between which and -t Student's distribution with that many degrees of freedom holds this share."""
    low, high = 0.0, 1.0
    while _share_within(high, num_freedoms) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, num_freedoms) < confidence else (low, middle)
    return high


def _share_within(t: float, num_freedoms: int) -> float:
    """P(|T| < t): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(num_freedoms))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = num_freedoms % 2 == 1
    total, term = 0.0, cosine if is_odd else 1.0
    for k in range(2 if is_odd else 1, num_freedoms, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
