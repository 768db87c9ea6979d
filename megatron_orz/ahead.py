"""One step ahead: the rollouts of the next step are generated while this one trains.

    servers   | generate 1 (v0)        | generate 2 (v1)         | ...
    trainer   | train on step 0 -> v1  | train on step 1 -> v2   |
                                      swap: every response is of one policy version, a step older than the trainer's

The loop knows nothing of it: its fleet is wrapped. What it asks for has been asked for already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_orz.data.prompts import PromptStream
from megatron_orz.types import Fleet, Metrics, NamedWeights, Prompt, Rollout


class BackgroundFleet(Fleet, Protocol):
    """A fleet that can generate while the ranks do something else."""

    def start(self, prompts: Sequence[Prompt], *, num_responses: int, seed: int) -> None:
        """Begins a `generate`; nothing else may be asked of the fleet before `finish`."""
        ...

    def finish(self) -> list[Rollout]:
        """Waits for what `start` began."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    prompts: list[Prompt]
    num_responses: int
    seed: int


class OneStepAhead:
    """A Fleet whose rollouts are one policy version old, from the second step on.

    Weights are swapped between responses: an update waits for those under way.
    """

    def __init__(self, fleet: BackgroundFleet, prompts: PromptStream, *, last_seed: int) -> None:
        """prompts: the stream of the loop, whose next prompts are asked ahead, under the next seed, up to last_seed."""
        self._fleet = fleet
        self._prompts = prompts
        self._last_seed = last_seed
        self._version = 0
        self._under_way: _Order | None = None
        self._ready: tuple[_Order, list[Rollout]] | None = None
        self._metrics: Metrics = {}

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Waits for the responses under way, then replaces the weights of every server."""
        start = time.perf_counter()
        if self._under_way is not None:
            self._ready = self._under_way, self._fleet.finish()
            self._under_way = None
        self._metrics = {"staleness/wait_s": time.perf_counter() - start}
        self._fleet.update_weights(weights, version)
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """The rollouts of these prompts, which lie ready unless this is the first step; begins with the next ones."""
        order = _Order(prompts=list(prompts), num_responses=num_responses, seed=seed)
        if self._ready is not None and self._ready[0] == order:
            rollouts = self._ready[1]
            if on_rollout is not None:
                for _ in rollouts:
                    on_rollout()
        else:
            rollouts = self._fleet.generate(prompts, num_responses=num_responses, seed=seed, on_rollout=on_rollout)
        self._ready = None
        self._metrics["staleness/steps"] = float(max(self._version - rollout.policy_version for rollout in rollouts))
        if seed < self._last_seed:
            following = self._prompts.upcoming(len(prompts))
            self._under_way = _Order(prompts=following, num_responses=num_responses, seed=seed + 1)
            self._fleet.start(following, num_responses=num_responses, seed=seed + 1)
        return rollouts

    def metrics(self) -> Metrics:
        """Of the last step: how many versions its rollouts were behind, and how long the update waited for others."""
        return self._metrics
