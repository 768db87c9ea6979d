"""The letter of an option, as answers to multiple-choice questions give it."""

from __future__ import annotations

import re

from megatron_orz.rewards.math_answer import Response, extract_answer
from megatron_orz.types import Grade

_MAX_ANSWER_CHARS = 1000
_WRAPPER = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox|boldsymbol)\s*\{([^{}]*)\}")
# "C", "(c)", "C.", "C) Paris", "(C) Paris", "Option C: Paris". A letter and a space would begin "A cat".
_LETTER = re.compile(
    r"(?:option|choice|answer)?[\s:]*(?:\(([A-Z])\)|([A-Z])(?=[.:)]|$))(.*)", re.IGNORECASE | re.DOTALL
)
_ANOTHER = re.compile(r"(?:\bor\b|\band\b|[,/&])\s*\(?[A-Z]\)?[.:)]?(?=\s|$)")


def option_letter(answer: str) -> str | None:
    """The one letter that an extracted answer names, in upper case; None when it names none or several."""
    answer = _WRAPPER.sub(r"\1", answer[:_MAX_ANSWER_CHARS]).strip("$ \n\t")
    match = _LETTER.fullmatch(answer)
    if match is None or _ANOTHER.search(match[3]):
        return None
    return (match[1] or match[2]).upper()


def grade_choice(response: Response) -> Grade:
    """Reward 1 for the letter of the reference in a finished response. Nothing here takes time."""
    text, finish_reason, reference = response
    answer = extract_answer(text)
    is_correct = answer is not None and option_letter(answer) == reference.strip().upper()
    return Grade(
        reward=1.0 if is_correct and finish_reason == "stop" else 0.0,
        is_correct=is_correct,
        is_formatted=answer is not None,
        timed_out=False,
        extracted=answer,
    )
