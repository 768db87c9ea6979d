"""Grades rollouts with the verifier, every rank its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_orz.ranks import Ranks
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseGrader:
    """A `Grader`: the text of a response against the reference answer of its prompt, by the kind of the answer."""

    def __init__(self, verifier: AnswerVerifier, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
        self._verifier = verifier
        self._tokenizer = tokenizer
        self._ranks = ranks

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        """Every rank gets the same rollouts and returns all of them graded; it grades every n-th one itself."""
        mine = rollouts[self._ranks.rank :: self._ranks.size]
        with self._ranks.share_fate("grading"):
            grades = self._verifier.grade(
                [rollout.prompt.kind for rollout in mine],
                [
                    (self._tokenizer.decode(rollout.response_ids), rollout.finish_reason, rollout.prompt.answer)
                    for rollout in mine
                ],
                on_grade=on_grade,
            )
        shares = self._ranks.gather(grades)
        num_ranks = self._ranks.size
        return [
            replace(rollout, grade=shares[index % num_ranks][index // num_ranks])
            for index, rollout in enumerate(rollouts)
        ]
