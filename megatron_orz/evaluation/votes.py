"""Which answers to one item are the same answer, as a majority vote counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_orz.rewards.choice import option_letter
from megatron_orz.types import AnswerKind, Grade

Equal = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]
"""Whether the two answers of each pair are equivalent."""


def vote_classes(
    kinds: Sequence[AnswerKind], grades: Sequence[Sequence[Grade]], equal: Equal
) -> list[list[int | None]]:
    """The class of every response's answer, from 0 in the order of their first appearance; None without an answer.

    kinds, grades: for each item its kind, and the grades of its responses. Right answers are one class. A wrong one
    joins the first class whose first member it equals. Programs are not compared: each text is a class of its own.
    """
    sorters = [_Sorter(kind, of_item) for kind, of_item in zip(kinds, grades, strict=True)]
    # Each round settles one class of every item, with a single call for all pairs.
    while any(sorter.pending for sorter in sorters):
        pairs = [sorter.pairs() for sorter in sorters]
        verdicts = iter(equal([pair for of_item in pairs for pair in of_item]))
        for sorter, of_item in zip(sorters, pairs, strict=True):
            sorter.settle([next(verdicts) for _ in of_item])
    return [sorter.classes() for sorter in sorters]


def answer_text(kind: AnswerKind, extracted: str) -> str:
    """What answers are first compared by: the letter of an option, else the text itself."""
    return (option_letter(extracted) if kind == "choice" else None) or extracted


@dataclass
class _Sorter:
    """Sorts the answers to one item."""

    kind: AnswerKind
    grades: Sequence[Grade]
    heads: dict[str, str] = field(default_factory=dict)
    """Text of an answer -> text that stands for its class."""
    pending: list[str] = field(default_factory=list)
    """Texts without a class, in the order of appearance; the first of them opens the next one."""

    def __post_init__(self) -> None:
        right: str | None = None
        for grade in self.grades:
            if grade.extracted is None:
                continue
            text = answer_text(self.kind, grade.extracted)
            if grade.is_correct and self.kind != "code":
                right = right or text
                self.heads[text] = right
            elif self.kind == "math":
                if text not in self.pending:
                    self.pending.append(text)
            else:
                self.heads[text] = text

    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons with the first pending text."""
        return [(text, self.pending[0]) for text in self.pending[1:]]

    def settle(self, verdicts: Sequence[bool]) -> None:
        """Opens a class with the first pending text; those that equal it join."""
        if not self.pending:
            return
        head, *rest = self.pending
        self.heads[head] = head
        self.heads.update((text, head) for text, is_equal in zip(rest, verdicts, strict=True) if is_equal)
        self.pending = [text for text, is_equal in zip(rest, verdicts, strict=True) if not is_equal]

    def classes(self) -> list[int | None]:
        """The numbers of the classes, a response each."""
        numbers: dict[str, int] = {}
        classes: list[int | None] = []
        for grade in self.grades:
            if grade.extracted is None:
                classes.append(None)
            else:
                head = self.heads[answer_text(self.kind, grade.extracted)]
                classes.append(numbers.setdefault(head, len(numbers)))
        return classes
