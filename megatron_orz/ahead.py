"""Ahead of the trainer: the rollouts of the next steps are generated while this one trains.

With max_staleness 1, and updates that wait for the responses under way:

    servers   | generate 1 (v0)        | generate 2 (v1)         | ...
    trainer   | train on step 0 -> v1  | train on step 1 -> v2   |

In general the rollouts of step n are begun once the servers hold version n - max_staleness: no token that is trained on
is older. An update waits for the rollouts of the step it belongs to, which were begun max_staleness steps ago, and for
single responses of later ones; or for nothing, where servers swap weights within responses.

The loop knows nothing of it: its fleet is wrapped. What it asks for has been asked for already.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Protocol

from megatron_orz.answers import Answers, Order, PendingAnswers, SavedAnswers
from megatron_orz.data.prompts import PromptStream
from megatron_orz.types import Fleet, Metrics, NamedWeights, Prompt, Rollout

_Progress = Callable[..., AbstractContextManager[Callable[[], None]]]


class UnderWay(Protocol):
    """Rollouts that were asked for."""

    def result(self) -> list[Rollout]:
        """Waits for them: siblings adjacent, in the order of the prompts. Collective."""
        ...


class BackgroundFleet(Fleet, Protocol):
    """A fleet that can generate while the ranks do something else."""

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        answers: Answers,
        on_rollout: Callable[[], None] | None = None,
    ) -> UnderWay:
        """Begins a `generate`. What was begun first is answered first; updates may come in between.

        answers: prompts that need not be asked; on rank 0 it grows with every answer.
        """
        ...


@dataclass(kw_only=True)
class _Batch:
    """The rollouts of one step, from the moment they are asked for until they are trained on."""

    order: Order
    answers: Answers
    rollouts: list[Rollout] | None = None
    """All of them, once they have been waited for."""
    started: float = field(default_factory=time.perf_counter)
    latest: float = 0.0
    """When the last rollout so far was finished."""

    def __post_init__(self) -> None:
        self._num_finished = sum(map(len, self.answers.values()))
        self._listener: Callable[[], None] | None = None
        self._lock = Lock()

    def note(self) -> None:
        """A rollout is finished; called in the fleet's thread."""
        with self._lock:
            self.latest = time.perf_counter()
            self._num_finished += 1
            listener = self._listener
        if listener is not None:
            listener()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Tells of every rollout, of those that are finished already too."""
        with self._lock:
            self._listener = listener
            num_finished = self._num_finished
        if listener is not None:
            for _ in range(num_finished):
                listener()


class GenerationAhead:
    """A Fleet whose rollouts are up to `max_staleness` policy versions old, and a `Stateful` part of a run.

    A checkpoint holds the rollouts that are answered and not trained on. Prompts under way are asked again by a run
    that goes on, under the same seeds.
    """

    def __init__(
        self,
        fleet: BackgroundFleet,
        prompts: PromptStream,
        *,
        max_staleness: int,
        last_seed: int,
        waits_for_responses: bool = True,
        is_main: bool = True,
        progress: _Progress = lambda description, *, total: nullcontext(lambda: None),
        on_span: Callable[[str, float, float], None] | None = None,
    ) -> None:
        """prompts: the stream of the loop, whose next prompts are asked ahead, under the next seeds, up to last_seed.

        waits_for_responses: an update finds no response of the next step unfinished.
        is_main: this rank's answers are those a checkpoint holds.
        progress: a bar for what an update waits for, as RunLog.progress.
        on_span: called with a name, the start and the end of generation that went on in the background.
        """
        self._fleet = fleet
        self._prompts = prompts
        self._max_staleness = max_staleness
        self._last_seed = last_seed
        self._waits_for_responses = waits_for_responses
        self._is_main = is_main
        self._progress = progress
        self._on_span = on_span
        self._version = 0
        self._batches: deque[tuple[_Batch, UnderWay]] = deque()
        self._saved: dict[int, SavedAnswers] = {}
        self._metrics: Metrics = {}

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the weights of every server, after the rollouts of the next step where these are waited for."""
        start = time.perf_counter()
        if self._batches and self._waits_for_responses:
            order = self._batches[0][0].order
            with self._progress("generate", total=len(order.prompts) * order.num_responses) as advance:
                self._result(*self._batches[0], advance)
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
        """The rollouts of these prompts, which lie ready or are under way unless this is the first step; begins with
        those of a step to come."""
        order = Order(prompts=list(prompts), num_responses=num_responses, seed=seed)
        if not self._batches or self._batches[0][0].order != order:
            self._discard()
            self._begin(order)
        batch, under_way = self._batches.popleft()
        self._begin_following(order)
        rollouts = self._result(batch, under_way, on_rollout)
        self._metrics |= _staleness(rollouts, self._version)
        return rollouts

    def metrics(self) -> Metrics:
        """Of the last step: versions by which its tokens were behind, the share of responses that several versions
        sampled, and how long the update waited for responses of the step."""
        return self._metrics

    def save_state(self, directory: Path, *, copy: bool) -> PendingAnswers:
        """Fixes which rollouts are there. Answers are never changed, so that `copy` makes no difference."""
        batches = [(batch.order, dict(batch.answers)) for batch, _ in self._batches] if self._is_main else []
        return PendingAnswers(directory, [(order, answers) for order, answers in batches if answers])

    def load_state(self, directory: Path) -> None:
        """Keeps the saved answers until their step is begun."""
        if self._is_main:
            self._saved = {int(path.stem): SavedAnswers.read(path) for path in directory.glob("*.npz")}

    def _begin(self, order: Order) -> None:
        saved = self._saved.pop(order.seed, None)
        batch = _Batch(order=order, answers={} if saved is None else saved.of(order))
        under_way = self._fleet.start(
            order.prompts,
            num_responses=order.num_responses,
            seed=order.seed,
            answers=batch.answers,
            on_rollout=batch.note,
        )
        self._batches.append((batch, under_way))

    def _begin_following(self, order: Order) -> None:
        """Asks for as many steps after that of `order` as may be under way."""
        size, num_steps = len(order.prompts), min(self._max_staleness, self._last_seed - order.seed)
        following = self._prompts.upcoming(num_steps * size)
        for step in range(len(self._batches), num_steps):
            prompts = following[step * size : (step + 1) * size]
            self._begin(Order(prompts=prompts, num_responses=order.num_responses, seed=order.seed + step + 1))

    def _discard(self) -> None:
        for _, under_way in self._batches:
            under_way.result()
        self._batches.clear()

    def _result(self, batch: _Batch, under_way: UnderWay, on_rollout: Callable[[], None] | None) -> list[Rollout]:
        batch.listen(on_rollout)
        if batch.rollouts is None:
            batch.rollouts = under_way.result()
            if self._on_span is not None and batch.latest:
                self._on_span("generate ahead", batch.started, batch.latest)
        batch.listen(None)
        return batch.rollouts


def _staleness(rollouts: Sequence[Rollout], version: int) -> Metrics:
    spans = [(version - of_span, num_tokens) for rollout in rollouts for of_span, num_tokens in rollout.spans]
    return {
        "staleness/mean": sum(age * num_tokens for age, num_tokens in spans) / sum(n for _, n in spans),
        "staleness/max": float(max(age for age, _ in spans)),
        "staleness/swapped_share": sum(bool(rollout.swaps) for rollout in rollouts) / len(rollouts),
    }
