"""Tells from a run's metrics when something goes wrong: spikes of losses and mismatch, collapse of the reward.

A metric is compared with its own recent past, by statistics that a few outliers do not move: the median of the last
WINDOW steps, and their median absolute deviation times 1.4826, which estimates the standard deviation of a normal
distribution (Rousseeuw and Croux, Alternatives to the median absolute deviation, 1993).

    spike      x > median + SPIKE_DEVIATIONS * max(deviation, |median|, the metric's floor)
    collapse   m < best / 2  and  best - m > max(0.05, COLLAPSE_DEVIATIONS * noise)

where m is the median reward of the last RECENT steps, best the largest such median so far, and noise the deviation of
the reward from one step to the next. What is not a finite number raises an alert, too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

WINDOW = 50
MIN_STEPS = 10
"""A metric is judged once it has so many steps behind it."""
SPIKE_DEVIATIONS = 10.0
COLLAPSE_DEVIATIONS = 5.0
RECENT = 5

SPIKE_FLOORS = {
    "policy/loss": 0.01,
    "policy/grad_norm": 0.0,
    "critic/loss": 0.0,
    "critic/grad_norm": 0.0,
    "log_prob_mismatch/mean": 1e-4,
    "log_prob_mismatch/max": 1e-2,
}
"""Metrics that are watched for spikes, and the smallest deviation that matters: below it differences are rounding."""

REWARD = "reward/mean"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One metric at one step."""

    metric: str
    message: str


class Alerts:
    """Watches the metrics of one run, step by step. A metric that stays bad raises one alert, until it was good again.

    history: the rows of the steps before.
    """

    def __init__(self, history: Iterable[Mapping[str, float]] = ()) -> None:
        self._past = {name: deque[float](maxlen=WINDOW) for name in (*SPIKE_FLOORS, REWARD)}
        self._best_reward = -math.inf
        self._raised: set[str] = set()
        for metrics in history:
            self.watch(metrics)

    def watch(self, metrics: Mapping[str, float]) -> list[Alert]:
        """The alerts that the metrics of one more step raise."""
        alerts = []
        for name, past in self._past.items():
            if name not in metrics:
                continue
            message = self._judge(name, metrics[name], past)
            if message is not None and name not in self._raised:
                alerts.append(Alert(metric=name, message=f"{name} {message}"))
            (self._raised.discard if message is None else self._raised.add)(name)
        return alerts

    def _judge(self, name: str, value: float, past: deque[float]) -> str | None:
        """What is wrong with a value, which becomes part of the past."""
        if not math.isfinite(value):
            return f"is {value}"
        message = None if len(past) < MIN_STEPS or name == REWARD else _spike(value, past, SPIKE_FLOORS[name])
        past.append(value)
        return self._collapse(past) if name == REWARD else message

    def _collapse(self, rewards: deque[float]) -> str | None:
        recent = median(list(rewards)[-RECENT:])
        if len(rewards) < MIN_STEPS:
            return None
        self._best_reward = max(self._best_reward, recent)
        noise = 1.4826 * median(abs(after - before) for before, after in pairwise(rewards)) / math.sqrt(2)
        drop = self._best_reward - recent
        if drop > max(self._best_reward / 2, 0.05, COLLAPSE_DEVIATIONS * noise):
            return f"has fallen to {recent:.3g} (median of {RECENT} steps) from {self._best_reward:.3g}"
        return None


def _spike(value: float, past: deque[float], floor: float) -> str | None:
    middle = median(past)
    deviation = max(1.4826 * median(abs(x - middle) for x in past), abs(middle), floor)
    if value <= middle + SPIKE_DEVIATIONS * deviation:
        return None
    return f"is {value:.3g}, {(value - middle) / deviation:.0f} deviations above its median {middle:.3g}"
