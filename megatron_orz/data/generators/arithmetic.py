"""Integer expressions with brackets: `Compute 12 * (7 - 31) + 5.`"""

from __future__ import annotations

import random

from megatron_orz.data.generators.task import Made, Task

_PRECEDENCE = {"+": 1, "-": 1, "*": 2}


def draw(rng: random.Random, level: int) -> Made:
    """An expression of level + 1 numbers below 10, 100, ... : one more digit on every second level."""
    text, value, _ = _expression(rng, level + 1, 10 ** ((level + 1) // 2) - 1)
    return Made(question=f"Compute ${text}$.", answer=str(value))


ARITHMETIC = Task(max_level=8, draw=draw)


def _expression(rng: random.Random, num_terms: int, largest: int) -> tuple[str, int, int]:
    """(text, value, precedence of the operator that is applied last)."""
    if num_terms == 1:
        term = rng.randint(1, largest)
        return str(term), term, 3
    split = rng.randint(1, num_terms - 1)
    left, left_value, left_precedence = _expression(rng, split, largest)
    right, right_value, right_precedence = _expression(rng, num_terms - split, largest)
    operator = rng.choice("+-*")
    precedence = _PRECEDENCE[operator]
    if left_precedence < precedence:
        left = f"({left})"
    if right_precedence <= precedence:
        right = f"({right})"
    match operator:
        case "+":
            value = left_value + right_value
        case "-":
            value = left_value - right_value
        case _:
            value = left_value * right_value
    return f"{left} {operator} {right}", value, precedence
