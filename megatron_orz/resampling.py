"""Which rollouts a step trains on, where not simply those of its next prompts: two options around fleet and grader.

Both take prompts from the stream of the run, on every rank alike, beside those the loop takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol

import numpy

from megatron_orz.data.prompts import PromptStream
from megatron_orz.types import Fleet, Grader, Metrics, NamedWeights, Prompt, Rollout


class ServersInParallel(Fleet, Protocol):
    """A fleet that need not wait for the slowest."""

    def generate_first(
        self,
        prompts: Sequence[Prompt],
        *,
        num_groups: int,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """The rollouts of the `num_groups` prompts that are answered first, siblings adjacent, in their order."""
        ...


class Oversampling:
    """A Fleet that is asked for more prompts than needed, and does without those answered last.

    A step no longer waits for its longest response. What is dropped is longer than the rest, so that the responses
    trained on are shorter than those the policy gives; dropped prompts come again in the next epoch. Which ones are
    dropped is a matter of time: runs do not repeat exactly.
    """

    def __init__(self, fleet: ServersInParallel, prompts: PromptStream, *, share: float) -> None:
        """share: of prompts asked in addition."""
        self._fleet = fleet
        self._prompts = prompts
        self._share = share
        self._num_dropped = 0

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the weights of every server."""
        self._fleet.update_weights(weights, version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each of as many prompts as are given, not all of them among these."""
        extra = self._prompts.take(math.ceil(self._share * len(prompts)))
        self._num_dropped += len(extra)
        return self._fleet.generate_first(
            [*prompts, *extra],
            num_groups=len(prompts),
            num_responses=num_responses,
            seed=seed,
            on_rollout=on_rollout,
        )

    def metrics(self) -> Metrics:
        """Prompts dropped since the run began."""
        return {"resampling/dropped_prompts": float(self._num_dropped)}


class DynamicSampling:
    """A Grader that replaces groups of siblings with equal rewards, which say nothing about what made the difference.

    It asks for other prompts in at most `max_rounds` rounds, each with as many prompts as groups are missing, and then
    fills up with the groups it has put aside, so that a step always has the same size.
    """

    def __init__(
        self,
        grader: Grader,
        fleet: Fleet,
        prompts: PromptStream,
        *,
        num_responses: int,
        max_rounds: int,
        seed: int,
    ) -> None:
        self._grader = grader
        self._fleet = fleet
        self._prompts = prompts
        self._num_responses = num_responses
        self._max_rounds = max_rounds
        self._seed = seed
        self._metrics: Metrics = {}

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        """As many graded rollouts as are given, siblings adjacent."""
        num_groups = len(rollouts) // self._num_responses
        drawn = self._groups(self._grader.grade(rollouts, on_grade=on_grade))
        kept, aside = _divide(drawn)
        num_rounds = 0
        while len(kept) < num_groups and num_rounds < self._max_rounds:
            num_rounds += 1
            more = self._more(num_groups - len(kept))
            drawn += more
            informative, uninformative = _divide(more)
            kept += informative
            aside += uninformative
        self._metrics = {
            "resampling/rounds": float(num_rounds),
            "resampling/drawn_groups": float(len(drawn)),
            "resampling/informative_share": sum(map(_is_informative, drawn)) / len(drawn),
            "resampling/filled_groups": float(num_groups - len(kept)),
            "resampling/drawn_reward_mean": fmean(fmean(_rewards(group)) for group in drawn),
        }
        kept += aside[: num_groups - len(kept)]
        return [rollout for group in kept for rollout in group]

    def metrics(self) -> Metrics:
        """Of the last step. `drawn_reward_mean` is the policy's; the step's own `reward/mean` is of what was kept."""
        return self._metrics

    def _more(self, num_groups: int) -> list[list[Rollout]]:
        # The position in the stream makes the seed another one in every round of every step.
        seed = int(numpy.random.SeedSequence([self._seed, self._prompts.cursor]).generate_state(1)[0])
        prompts = self._prompts.take(num_groups)
        rollouts = self._fleet.generate(prompts, num_responses=self._num_responses, seed=seed)
        return self._groups(self._grader.grade(rollouts))

    def _groups(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        size = self._num_responses
        return [list(rollouts[start : start + size]) for start in range(0, len(rollouts), size)]


def _divide(groups: Sequence[list[Rollout]]) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
    return [group for group in groups if _is_informative(group)], [
        group for group in groups if not _is_informative(group)
    ]


def _is_informative(group: Sequence[Rollout]) -> bool:
    return len(set(_rewards(group))) > 1


def _rewards(group: Sequence[Rollout]) -> list[float]:
    return [rollout.grade.reward for rollout in group if rollout.grade is not None]
