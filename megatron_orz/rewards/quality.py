"""What the reward does not see of a response: its format, and signs of reflection."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_orz.types import Grade

REFLECTION_PATTERNS = ("wait,", "recheck", "retry", "alternatively,", "however,")
"""A response that holds one of them, in any case, reflects on itself."""


def is_reflective(response: str) -> bool:
    """Whether the response holds one of the patterns."""
    lowered = response.lower()
    return any(pattern in lowered for pattern in REFLECTION_PATTERNS)


def reflection_share(responses: Sequence[str]) -> float:
    """The share of responses that hold a reflection pattern; 0 when there are no responses."""
    return _mean([is_reflective(response) for response in responses])


def format_share(grades: Sequence[Grade]) -> float:
    """The share of responses an answer could be extracted from; 0 when there are no responses."""
    return _mean([grade.is_formatted for grade in grades])


def mean_correct_tokens(
    responses: Sequence[str], grades: Sequence[Grade], num_tokens: Sequence[int]
) -> tuple[float, float]:
    """Mean length of the correct responses with reflection, and of all correct ones; 0 when there are none."""
    correct = [
        (is_reflective(response), length)
        for response, grade, length in zip(responses, grades, num_tokens, strict=True)
        if grade.is_correct
    ]
    return _mean([length for reflects, length in correct if reflects]), _mean([length for _, length in correct])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
