"""The numbers game: what can be made of a few numbers.

Asked for an expression that makes a number, a verifier of values accepts that number itself. So the problem asks for
the closest number that can be made: one right answer, which is found by searching.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_orz.data.generators.task import Made, Task

_QUESTION = (
    "Use each of the numbers {numbers} exactly once, with addition, subtraction, multiplication, division and "
    "parentheses. Every intermediate result must be a positive integer. "
    "What is the largest integer not above {limit} that can be made?"
)
MAX_NUMBER = 25
MAX_LIMIT = 999


def draw(rng: random.Random, level: int) -> Made:
    """level + 2 numbers."""
    while True:
        numbers = sorted(rng.randint(1, MAX_NUMBER) for _ in range(level + 2))
        limit = rng.randint(10, MAX_LIMIT)
        # The largest of all, or the limit itself, takes no search.
        makeable = reachable(numbers)
        below = [value for value in makeable if value < limit]
        if below and limit not in makeable and max(makeable) > limit:
            listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
            return Made(question=_QUESTION.format(numbers=listed, limit=limit), answer=str(max(below)))


COUNTDOWN = Task(max_level=3, draw=draw)


def reachable(numbers: Sequence[int]) -> set[int]:
    """Every positive integer that uses all the numbers once, by the values of their subsets, small ones first."""
    whole = (1 << len(numbers)) - 1
    values: dict[int, set[int]] = {1 << index: {number} for index, number in enumerate(numbers)}
    for subset in range(1, whole + 1):
        if subset in values:
            continue
        found: set[int] = set()
        part = (subset - 1) & subset
        while part:
            other = subset ^ part
            if part > other:  # each split once
                for a in values[part]:
                    for b in values[other]:
                        found |= {a + b, a * b, abs(a - b)}
                        found.add(max(a, b) // min(a, b) if max(a, b) % min(a, b) == 0 else a + b)
            part = (part - 1) & subset
        values[subset] = found - {0}
    return values[whole]
