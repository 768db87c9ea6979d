"""What generators have in common: a problem drawn at a level, and many different ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_MAX_FRUITLESS_DRAWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A problem and its only right answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of problem."""

    max_level: int
    draw: Callable[[random.Random, int], Made]
    """(rng, level) -> a problem of that level, the first of which is 1."""

    def make(self, *, level: int, num_problems: int, seed: int) -> Iterator[Made]:
        """Problems that all differ. The first n of them do not depend on how many are made.

        Raises ValueError when the level does not exist, or when it holds too few different problems.
        """
        if not 1 <= level <= self.max_level:
            raise ValueError(f"level {level} is outside [1, {self.max_level}], the levels of this task")
        rng = random.Random(f"{seed}/{level}")
        questions: set[str] = set()
        for _ in range(num_problems):
            for _ in range(_MAX_FRUITLESS_DRAWS):
                made = self.draw(rng, level)
                if made.question not in questions:
                    break
            else:
                raise ValueError(
                    f"only {len(questions)} different problems of level {level} were found and {num_problems} asked "
                    "for; raise the level"
                )
            questions.add(made.question)
            yield made
