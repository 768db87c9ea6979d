"""Equivalence classes of answers: by an exact rule, and by the verifier itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from megatron_orz.evaluation.run import equal_answers
from megatron_orz.evaluation.votes import vote_classes
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import Grade


def grade(extracted: str | None, is_correct: bool = False) -> Grade:
    return Grade(
        reward=float(is_correct),
        is_correct=is_correct,
        is_formatted=extracted is not None,
        timed_out=False,
        extracted=extracted,
    )


def equal_modulo_ten(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    return [(int(left) - int(right)) % 10 == 0 for left, right in pairs]


@given(st.lists(st.lists(st.none() | st.integers(0, 39), max_size=12), max_size=4))
def test_classes_are_those_of_the_equivalence(items: list[list[int | None]]) -> None:
    """The reference answer is 3."""
    grades = [
        [grade(None if value is None else str(value), value is not None and value % 10 == 3) for value in item]
        for item in items
    ]
    classes = vote_classes(["math"] * len(items), grades, equal_modulo_ten)
    for values, numbers in zip(items, classes, strict=True):
        first_seen = list(dict.fromkeys(value % 10 for value in values if value is not None))
        assert numbers == [None if value is None else first_seen.index(value % 10) for value in values]


def test_the_verifier_joins_what_is_written_differently() -> None:
    answers = ["\\frac{1}{2}", "0.50", "x+1", "1+x", "7", "\\frac12", None, "1/2"]
    with AnswerVerifier(timeout_s=120.0, num_workers=1) as verifier:
        (numbers,) = vote_classes(
            ["math"], [[grade(answer, answer == "7") for answer in answers]], partial(equal_answers, verifier)
        )
    assert numbers == [0, 0, 1, 1, 2, 0, None, 0]


def test_letters_are_compared_without_the_verifier_and_programs_by_their_text() -> None:
    def never(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        assert not pairs
        return []

    letters = [grade("(B)"), grade("b"), grade("C. x", True), grade("C", True), grade("none"), grade(None)]
    programs = [grade("print(1)", True), grade("print(2)", True), grade("print(1)", True)]
    assert vote_classes(["choice", "code"], [letters, programs], never) == [[0, 0, 1, 1, 2, None], [0, 1, 0]]
