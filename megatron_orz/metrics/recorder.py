"""A step's rollouts as metrics, as histograms, and as a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from megatron_orz.config import GenerationsConfig
from megatron_orz.generations import Generation, generations_file, write_generations
from megatron_orz.logs import RunLog, writing
from megatron_orz.metrics.rollouts import lengths_by_answer, rollout_metrics
from megatron_orz.metrics.traits import Traits, traits_of
from megatron_orz.ranks import Ranks
from megatron_orz.types import Metrics, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


class RolloutRecorder:
    """What a run keeps of its rollouts. Every rank looks at its share of the texts; rank 0 writes."""

    def __init__(
        self, config: GenerationsConfig, *, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, log: RunLog
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._log = log

    def record(self, step: int, rollouts: Sequence[Rollout]) -> Metrics:
        """The metrics of a step's graded rollouts; their lengths as histograms; the rollouts themselves, if it is due.

        Collective: every rank brings the same rollouts and gets the same metrics, but for `generations/left_out`, which
        rank 0 counts. Raises RunDirectoryError when the file cannot be written.
        """
        with self._log.span("record"):
            mine = rollouts[self._ranks.rank :: self._ranks.size]
            with self._ranks.share_fate("describing the rollouts"):
                texts = self._tokenizer.batch_decode([rollout.response_ids for rollout in mine])
                my_traits = traits_of(texts, [rollout.response_ids for rollout in mine])
            traits = _interleaved(self._ranks.gather(my_traits), len(rollouts))
            for answer, lengths in lengths_by_answer(rollouts).items():
                self._log.distribution(f"response/{answer}_length", lengths)
            metrics = rollout_metrics(rollouts, traits)
            if self._config.interval and step % self._config.interval == 0:
                shares_of_texts = self._ranks.collect(texts)
                with self._ranks.share_fate("saving the rollouts"):
                    if self._ranks.rank == 0:
                        metrics |= self._save(step, rollouts, traits, _interleaved(shares_of_texts, len(rollouts)))
        return metrics

    def _save(
        self, step: int, rollouts: Sequence[Rollout], traits: Sequence[Traits], responses: Sequence[str]
    ) -> Metrics:
        path = generations_file(self._log.run_dir, step)
        token_ids = {rollout.prompt.prompt_id: rollout.prompt.token_ids for rollout in rollouts}
        prompts = dict(zip(token_ids, self._tokenizer.batch_decode(list(token_ids.values())), strict=True))
        rows = [
            _generation(step, rollout, traits, prompts[rollout.prompt.prompt_id], response)
            for rollout, traits, response in zip(rollouts, traits, responses, strict=True)
        ]
        with writing(path):
            num_left_out = write_generations(rows, path, max_mib=self._config.max_mib)
        return {"generations/left_out": float(num_left_out)}


def _interleaved(shares: Sequence[Sequence[T]], num_rollouts: int) -> list[T]:
    """What the ranks say of rollouts 0, 1, 2, ..., which they take in turns."""
    return [shares[index % len(shares)][index // len(shares)] for index in range(num_rollouts)]


def _generation(step: int, rollout: Rollout, traits: Traits, prompt: str, response: str) -> Generation:
    grade = rollout.grade
    assert grade is not None
    return Generation(
        step=step,
        prompt_id=rollout.prompt.prompt_id,
        source=rollout.prompt.source,
        prompt=prompt,
        response=response,
        answer=rollout.prompt.answer,
        extracted=grade.extracted,
        reward=grade.reward,
        is_correct=grade.is_correct,
        is_formatted=grade.is_formatted,
        timed_out=grade.timed_out,
        finish_reason=rollout.finish_reason,
        num_prompt_tokens=len(rollout.prompt.token_ids),
        num_response_tokens=len(rollout.response_ids),
        policy_version=rollout.policy_version,
        swaps=rollout.swaps,
        reflection=list(traits.reflection),
        repetition=traits.repetition,
        prompt_ids=rollout.prompt.token_ids,
        response_ids=rollout.response_ids,
    )
