"""Answers the items of a benchmark, grades them and records them, some items at a time.

Item --generate--> Rollout --grade, vote--> ItemRecord --append--> RecordFile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from megatron_orz.evaluation.benchmark import Benchmark, Item
from megatron_orz.evaluation.records import ItemRecord, RecordFile, ResponseRecord
from megatron_orz.evaluation.votes import vote_classes
from megatron_orz.rewards.math_answer import Response
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import Grader, Prompt, Rollout

CHUNK_ITEMS = 64
"""Items that are generated together, and recorded together. Their seeds depend on it."""


class Generate(Protocol):
    """`Fleet.generate`."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]: ...


def answer_items(
    benchmark: Benchmark,
    generate: Generate,
    grader: Grader,
    verifier: AnswerVerifier,
    decode: Callable[[list[int]], str],
    records: RecordFile,
    *,
    num_responses: int,
    seed: int,
    on_response: Callable[[], None],
) -> list[ItemRecord]:
    """The records of all items, in their order. Those that the file holds already are not asked again.

    verifier: compares answers for the vote. on_response: called for every response that is generated, and for those
    that are on file.
    """
    for start in range(0, len(benchmark.items), CHUNK_ITEMS):
        chunk = benchmark.items[start : start + CHUNK_ITEMS]
        if all(item.key in records.records for item in chunk):
            for _ in range(len(chunk) * num_responses):
                on_response()
            continue
        # A chunk is asked as a whole even if some of it is on file: seeds go by the place of a prompt in its call.
        rollouts = generate(
            [item.prompt for item in chunk],
            num_responses=num_responses,
            seed=seed * 1_000_003 + start,
            on_rollout=on_response,
        )
        records.append(_records(chunk, grader.grade(rollouts), verifier, decode, num_responses))
    return [records.records[item.key] for item in benchmark.items]


def _records(
    chunk: Sequence[Item],
    rollouts: Sequence[Rollout],
    verifier: AnswerVerifier,
    decode: Callable[[list[int]], str],
    num_responses: int,
) -> list[ItemRecord]:
    grades = [rollout.grade for rollout in rollouts if rollout.grade is not None]
    assert len(grades) == len(rollouts)
    spans = [slice(number * num_responses, (number + 1) * num_responses) for number in range(len(chunk))]
    votes = vote_classes(
        [item.problem.kind for item in chunk], [grades[span] for span in spans], partial(equal_answers, verifier)
    )
    return [
        ItemRecord(
            item=item.key,
            place=item.problem.place,
            kind=item.problem.kind,
            problem=item.problem.text,
            # The tests of a program can be megabytes.
            answer="" if item.problem.kind == "code" else item.problem.answer,
            responses=tuple(
                ResponseRecord(
                    text=decode(rollout.response_ids),
                    num_tokens=len(rollout.response_ids),
                    finish_reason=rollout.finish_reason,
                    reward=grade.reward,
                    is_correct=grade.is_correct,
                    is_formatted=grade.is_formatted,
                    timed_out=grade.timed_out,
                    extracted=grade.extracted,
                    vote=vote,
                )
                for rollout, grade, vote in zip(rollouts[span], grades[span], of_item, strict=True)
            ),
        )
        for item, span, of_item in zip(chunk, spans, votes, strict=True)
    ]


def equal_answers(verifier: AnswerVerifier, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the verifier takes each pair of values for equal; past its deadline they are not."""
    responses: list[Response] = [(f"<answer>\\boxed{{{answer}}}</answer>", "stop", other) for answer, other in pairs]
    return [grade.is_correct for grade in verifier.grade(["math"] * len(pairs), responses)]
