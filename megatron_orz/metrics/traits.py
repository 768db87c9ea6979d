"""What the reward does not see of a response: signs of reflection, and repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_orz.metrics.repetition import repetition_scores

REFLECTION_PATTERNS = ("wait,", "recheck", "retry", "alternatively,", "however,")
"""The paper's. A response that holds one of them, in any case, reflects on itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """Of one response."""

    reflection: tuple[str, ...]
    """The reflection patterns it holds."""
    repetition: float
    """In [0, 1): see `repetition.py`."""


def traits_of(texts: Sequence[str], responses: Sequence[Sequence[int]]) -> list[Traits]:
    """The traits of each response, from its text and its token ids."""
    return [
        Traits(reflection=reflection_patterns(text), repetition=score)
        for text, score in zip(texts, repetition_scores(responses), strict=True)
    ]


def reflection_patterns(text: str) -> tuple[str, ...]:
    """The reflection patterns in a text.

    >>> reflection_patterns("Wait, I should recheck this. However it is late")
    ('wait,', 'recheck')
    """
    lowered = text.lower()
    return tuple(pattern for pattern in REFLECTION_PATTERNS if pattern in lowered)
