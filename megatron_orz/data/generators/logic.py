"""Knights and knaves: who tells the truth, when everyone says something about the others?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import TypeAlias

from megatron_orz.data.generators.task import Made, Task

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
_QUESTION = (
    "Knights always tell the truth and knaves always lie. Each of {names} is a knight or a knave.\n"
    "{statements}\n"
    "Who is what? Answer with one digit for each of them, in this order and without spaces: "
    "1 for a knight, 0 for a knave."
)

Statement: TypeAlias = tuple[str, Callable[[Sequence[bool]], bool]]
"""What is said, and whether it is true of (who is a knight)."""


def draw(rng: random.Random, level: int) -> Made:
    """level + 2 people; the statements grow from what another one is to conditions. The answer is never 0...0."""
    people = range(level + 2)
    kinds = _KINDS[: 2 + level // 2]
    while True:
        statements = [rng.choice(kinds)(rng, speaker, len(people)) for speaker in people]
        worlds = [
            world
            for world in product((False, True), repeat=len(people))
            if all(world[speaker] == is_true(world) for speaker, (_, is_true) in enumerate(statements))
        ]
        if len(worlds) == 1 and any(worlds[0]):
            said = "\n".join(f'{NAMES[speaker]} says: "{text}"' for speaker, (text, _) in enumerate(statements))
            listed = f"{', '.join(NAMES[: len(people) - 1])} and {NAMES[len(people) - 1]}"
            answer = "".join("1" if is_knight else "0" for is_knight in worlds[0])
            return Made(question=_QUESTION.format(names=listed, statements=said), answer=answer)


LOGIC = Task(max_level=len(NAMES) - 2, draw=draw)


def _other(rng: random.Random, *taken: int, num_people: int) -> int:
    return rng.choice([person for person in range(num_people) if person not in taken])


def _is_a(rng: random.Random, speaker: int, num_people: int) -> Statement:
    other, is_knight = _other(rng, speaker, num_people=num_people), rng.random() < 0.5
    return f"{NAMES[other]} is a {_kind(is_knight)}.", lambda world: world[other] == is_knight


def _alike(rng: random.Random, speaker: int, num_people: int) -> Statement:
    other, are_alike = _other(rng, speaker, num_people=num_people), rng.random() < 0.5
    text = f"{NAMES[other]} and I are of {'the same kind' if are_alike else 'different kinds'}."
    return text, lambda world: (world[other] == world[speaker]) == are_alike


def _count(rng: random.Random, speaker: int, num_people: int) -> Statement:
    count = rng.randint(0, num_people)
    return f"The number of knights among us is {count}.", lambda world: sum(world) == count


def _if_then(rng: random.Random, speaker: int, num_people: int) -> Statement:
    first = _other(rng, speaker, num_people=num_people)
    second = _other(rng, speaker, first, num_people=num_people)
    if_knight, then_knight = rng.random() < 0.5, rng.random() < 0.5
    text = f"If {NAMES[first]} is a {_kind(if_knight)}, then {NAMES[second]} is a {_kind(then_knight)}."
    return text, lambda world: world[first] != if_knight or world[second] == then_knight


_KINDS = (_is_a, _alike, _count, _if_then)
"""In the order in which levels introduce them."""


def _kind(is_knight: bool) -> str:
    return "knight" if is_knight else "knave"
