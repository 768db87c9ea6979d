"""Responses that are graded as they arrive get the grades that they would get later, once, and in their places."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.ranks import Ranks, RemoteError
from megatron_orz.rewards.early_grades import EarlyGrades
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import Grade, Prompt, Rollout
from tests.launch import run_ranks
from tests.rewards.test_grading import CASES, make_rollouts

DEADLINE_S = 120.0


class CountingVerifier(AnswerVerifier):
    """Keeps the texts it was asked for."""

    def __init__(self) -> None:
        super().__init__(timeout_s=DEADLINE_S, num_workers=1)
        self.texts: list[str] = []

    def grade(self, kinds: Any, responses: Any, *, on_grade: Callable[[], None] | None = None) -> list[Grade]:
        self.texts += [text for text, _, _ in responses]
        return super().grade(kinds, responses, on_grade=on_grade)


def rollout(response: int, *, prompt: int = 0, version: int = 0) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt, token_ids=[1], answer=str(prompt), source="test"),
        response_ids=[response, 7],
        rollout_log_probs=[-1.0, -1.0],
        finish_reason="stop",
        policy_version=version,
    )


def grade_of(rollout: Rollout) -> Grade:
    """Tells of which response a grade is."""
    said = str(rollout.response_ids[0])
    return Grade(reward=0.0, is_correct=False, is_formatted=True, timed_out=False, extracted=said)


def copied(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """As they come back from between the ranks: equal, and nothing of them the same."""
    return [
        replace(r, prompt=replace(r.prompt), response_ids=list(r.response_ids), rollout_log_probs=[0.0, 0.0])
        for r in rollouts
    ]


def check_ranks(ranks: Ranks, begun_by: Sequence[Sequence[int]]) -> None:
    """What one rank does: it begins some of the responses, each on its own."""
    rollouts = make_rollouts()
    with CountingVerifier() as verifier:
        grader = ResponseGrader(verifier, build_tokenizer(), ranks, num_threads=2)
        for place in begun_by[ranks.rank]:
            grader.begin(make_rollouts()[place : place + 1])
        for begun in grader._early._begun.values():
            begun[0].grade()
        progress: list[None] = []
        graded = grader.grade(rollouts, on_grade=lambda: progress.append(None))
        assert [(r.grade.reward, r.grade.is_correct, r.grade.is_formatted) for r in graded if r.grade] == [
            expected for _, expected in CASES
        ]
        assert [r.response_ids for r in graded] == [r.response_ids for r in rollouts]
        # Together the ranks have graded every response once, and told of it once.
        texts = [text for of_rank in ranks.gather(verifier.texts) for text in of_rank]
        assert sorted(texts) == sorted(text for (text, _, _), _ in CASES)
        assert sum(ranks.gather(len(progress))) == len(CASES)
        num_begun = sum(map(len, begun_by))
        assert grader.metrics() == {"perf/graded_early_share": num_begun / len(CASES)}
        assert grader.metrics() == {}
        grader.close()


@pytest.mark.parametrize("begun", [[], [3, 0, 6], range(len(CASES))], ids=["none", "some", "all"])
def test_what_is_begun_early_is_graded_once_and_as_it_would_be_later(begun: Sequence[int]) -> None:
    check_ranks(Ranks(), [begun])


def check_two_ranks() -> None:
    """What one rank of two does."""
    dist.init_process_group("gloo")
    ranks = Ranks()
    check_ranks(ranks, [[5, 1, 2], [6]])
    check_failure(ranks)
    ranks.close()
    dist.destroy_process_group()


def check_failure(ranks: Ranks) -> None:
    """The first rank fails at a response in the background, and both learn of it."""
    damaged = [replace(make_rollouts()[0], response_ids=["no token"])]  # type: ignore[list-item]
    with AnswerVerifier(timeout_s=DEADLINE_S, num_workers=1) as verifier:
        grader = ResponseGrader(verifier, build_tokenizer(), ranks)
        if ranks.rank == 0:
            grader.begin(damaged)
            for begun in grader._early._begun.values():
                begun[0].grades.exception(DEADLINE_S)
        with pytest.raises((TypeError, RemoteError)) as caught:
            grader.grade(damaged)
        assert isinstance(caught.value, TypeError) == (ranks.rank == 0)
        grader.close()


def test_ranks_that_begin_different_responses_grade_them_all_once_and_share_what_goes_wrong() -> None:
    run_ranks(2, check_two_ranks)


def test_equal_responses_are_each_taken_once() -> None:
    early = EarlyGrades(lambda rollouts: [grade_of(r) for r in rollouts], num_threads=1, max_staleness=0)
    early.begin([rollout(3), rollout(4), rollout(3)])
    asked = [rollout(3), rollout(3), rollout(3, prompt=1), rollout(3), rollout(4)]
    asked[4] = replace(asked[4], finish_reason="length")  # which has another grade
    for begun in next(iter(early._begun.values())):
        begun.grade()
    taken = early.take(copied(asked))
    assert {place: begun.grade().extracted for place, begun in taken.items()} == {0: "3", 1: "3"}
    early.close()


def held_up() -> tuple[EarlyGrades, threading.Event, threading.Event]:
    """With one thread that has begun when the first event is set, and goes on when the second is."""
    has_begun, is_free = threading.Event(), threading.Event()

    def grade(rollouts: Sequence[Rollout]) -> list[Grade]:
        has_begun.set()
        assert is_free.wait(DEADLINE_S)
        return [grade_of(r) for r in rollouts]

    return EarlyGrades(grade, num_threads=1, max_staleness=0), has_begun, is_free


def test_what_only_waits_when_all_are_there_is_left_to_all_ranks() -> None:
    early, has_begun, is_free = held_up()
    groups = [[rollout(response, prompt=prompt) for response in (5, 6)] for prompt in range(3)]
    for siblings in groups:
        early.begin(siblings)
    assert has_begun.wait(DEADLINE_S)
    taken = early.take(copied([*groups[2], *groups[0], *groups[1]]))
    assert list(taken) == [2, 3]
    is_free.set()
    assert [begun.grade().extracted for begun in taken.values()] == ["5", "6"]
    early.close()


@pytest.mark.parametrize(("max_staleness", "expected"), [(0, {}), (1, {0: "5"})])
def test_what_is_too_old_to_be_asked_for_is_dropped(max_staleness: int, expected: dict[int, str]) -> None:
    early = EarlyGrades(lambda rollouts: [grade_of(r) for r in rollouts], num_threads=1, max_staleness=max_staleness)
    early.begin([rollout(5, version=1)])
    (begun,) = early._begun[0, "test", 1]
    begun.grade()
    assert early.take([rollout(6, version=2)]) == {}
    assert {place: one.grade().extracted for place, one in early.take([rollout(5, version=1)]).items()} == expected
    early.take([rollout(6, version=5)])
    assert not early._begun
    early.close()


def test_grading_under_way_ends_when_the_verifier_is_closed() -> None:
    """A thread that waited for comparisons which are dropped would keep the process from ending."""
    tokenizer = build_tokenizer()
    first = make_rollouts()[6]
    siblings = [
        replace(first, response_ids=tokenizer(f"<answer>\\boxed{{x+1+{number}}}</answer>")["input_ids"])
        for number in range(200)
    ]
    with AnswerVerifier(timeout_s=DEADLINE_S, num_workers=1) as verifier:
        grader = ResponseGrader(verifier, tokenizer, Ranks())
        grader.begin(siblings)
        (begun, *_) = next(iter(grader._early._begun.values()))
        while not verifier._math._threads._work_queue.qsize():
            time.sleep(0.01)
        grader.close()
    assert isinstance(begun.grades.exception(DEADLINE_S), CancelledError)


def test_a_grader_that_is_closed_begins_nothing_and_keeps_nobody_waiting() -> None:
    early, has_begun, is_free = held_up()
    early.begin([rollout(5)])
    assert has_begun.wait(DEADLINE_S)
    early.begin([rollout(6)])
    early.close()
    early.begin([rollout(7)])
    assert early.take([rollout(6), rollout(7)]) == {}
    is_free.set()
