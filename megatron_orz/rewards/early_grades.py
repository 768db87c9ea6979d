"""Grades of responses that have arrived, found while others are still on their way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

from megatron_orz.types import Grade, Rollout

_Key: TypeAlias = tuple[int, str, int]
"""Number and source of a prompt, and a policy version."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Begun:
    """A response whose grade is on its way or there."""

    rollout: Rollout
    grades: Future[list[Grade]]
    """Of all responses that arrived together."""
    index: int
    """Its own among them."""

    def grade(self) -> Grade:
        """Waits for it. Raises what went wrong."""
        return self.grades.result()[self.index]

    def is_of(self, rollout: Rollout) -> bool:
        """Whether all that a grade depends on is the same."""
        mine = self.rollout
        return (mine.finish_reason, mine.response_ids, mine.prompt) == (
            rollout.finish_reason, rollout.response_ids, rollout.prompt
        )  # fmt: skip


class EarlyGrades:
    """What was begun in the background and is not asked for yet. Every response is graded once, and taken once."""

    def __init__(
        self, grade: Callable[[Sequence[Rollout]], list[Grade]], *, num_threads: int, max_staleness: int
    ) -> None:
        """grade: called in one of `num_threads` threads for responses that arrived together.

        max_staleness: policy versions that a response may be behind; what is older will not be asked for.
        """
        self._grade = grade
        self._max_staleness = max_staleness
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="grading")
        self._begun: defaultdict[_Key, list[Begun]] = defaultdict(list)
        self._is_closed = False
        self._lock = Lock()

    def begin(self, rollouts: Sequence[Rollout]) -> None:
        """Grades responses in the background. Returns at once, and is called in any thread."""
        with self._lock:
            if self._is_closed:
                return
            grades = self._threads.submit(self._grade, rollouts)
            for index, rollout in enumerate(rollouts):
                self._begun[_key(rollout)].append(Begun(rollout=rollout, grades=grades, index=index))

    def take(self, rollouts: Sequence[Rollout]) -> dict[int, Begun]:
        """Those of the rollouts whose grading has really begun, by their place. What only waited for it is dropped."""
        taken = {}
        with self._lock:
            for place, rollout in enumerate(rollouts):
                candidates = self._begun.get(_key(rollout), [])
                for number, begun in enumerate(candidates):
                    if begun.is_of(rollout):
                        taken[place] = candidates.pop(number)
                        break
            if rollouts:
                self._drop_older_than(max(rollout.policy_version for rollout in rollouts) - self._max_staleness)
        return {place: begun for place, begun in taken.items() if not begun.grades.cancel()}

    def close(self) -> None:
        """Begins nothing more, and waits for nothing."""
        with self._lock:
            self._is_closed = True
            self._begun.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _drop_older_than(self, version: int) -> None:
        """Responses that nobody asked for, such as those that came too late for their step."""
        for key in [key for key, begun in self._begun.items() if not begun or key[2] < version]:
            for begun in self._begun.pop(key):
                begun.grades.cancel()


def _key(rollout: Rollout) -> _Key:
    return rollout.prompt.prompt_id, rollout.prompt.source, rollout.policy_version
