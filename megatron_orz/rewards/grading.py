"""Grades rollouts with the verifier: each when it arrives, on the rank where it does, and the rest on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_orz.ranks import Ranks
from megatron_orz.rewards.early_grades import EarlyGrades
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import Grade, Metrics, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseGrader:
    """A `Grader`: the text of a response against the reference answer of its prompt, by the kind of the answer."""

    def __init__(
        self,
        verifier: AnswerVerifier,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        *,
        num_threads: int = 1,
        max_staleness: int = 0,
    ) -> None:
        """num_threads: for what arrives. max_staleness: policy versions that rollouts may be behind."""
        self._verifier = verifier
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._early = EarlyGrades(self._grades, num_threads=num_threads, max_staleness=max_staleness)
        self._num_graded = self._num_early = 0

    def begin(self, rollouts: Sequence[Rollout]) -> None:
        """Begins to grade rollouts that `grade` will be asked for. Returns at once; in any thread, on any rank."""
        self._early.begin(rollouts)

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        """Every rank gets the same rollouts and returns all of them graded.

        It waits for those it has begun; of those that no rank has begun it grades every n-th one.
        """
        advance = on_grade or (lambda: None)
        begun = self._early.take(rollouts)
        num_early = sum(one.grades.done() for one in begun.values())
        places_of_ranks, nums_early = zip(*self._ranks.gather((list(begun), num_early)), strict=True)
        rank_of = {place: rank for rank, places in enumerate(places_of_ranks) for place in places}
        rest = [place for place in range(len(rollouts)) if place not in rank_of]
        for number, place in enumerate(rest):
            rank_of[place] = number % self._ranks.size
        mine = rest[self._ranks.rank :: self._ranks.size]
        with self._ranks.share_fate("grading"):
            grades = dict(zip(mine, self._grades([rollouts[place] for place in mine], on_grade), strict=True))
            for place, one in begun.items():
                grades[place] = one.grade()
                advance()
        shares = self._ranks.gather(grades)
        self._num_graded += len(rollouts)
        self._num_early += sum(nums_early)
        return [replace(rollout, grade=shares[rank_of[place]][place]) for place, rollout in enumerate(rollouts)]

    def metrics(self) -> Metrics:
        """The share of the rollouts graded since the last call whose grade was there when the last of them arrived."""
        num_graded, num_early = self._num_graded, self._num_early
        self._num_graded = self._num_early = 0
        return {"perf/graded_early_share": num_early / num_graded} if num_graded else {}

    def close(self) -> None:
        """Begins nothing more."""
        self._early.close()

    def _grades(self, rollouts: Sequence[Rollout], on_grade: Callable[[], None] | None = None) -> list[Grade]:
        return self._verifier.grade(
            [rollout.prompt.kind for rollout in rollouts],
            [
                (self._tokenizer.decode(rollout.response_ids), rollout.finish_reason, rollout.prompt.answer)
                for rollout in rollouts
            ],
            on_grade=on_grade,
        )
