"""What a look at a problem and its answer rules out: multiple choice, proofs, answers that are not values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_orz.data.curation.stage import STAYS, Advance, Candidate, Verdict


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Drops problems whose form keeps a verifier from telling a right answer from a guess."""

    max_problem_chars: int = 8000
    """Longer problems are dropped."""
    max_answer_chars: int = 200
    """Longer answers are dropped: they are derivations, not values."""

    def __post_init__(self) -> None:
        for name in ("max_problem_chars", "max_answer_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"rules.{name} {getattr(self, name)} is not at least 1")

    def judge(self, candidates: Sequence[Candidate], advance: Advance) -> list[Verdict]:
        """Reasons: `too_long`, `multiple_choice`, `proof`, `prose_answer`."""
        verdicts = []
        for candidate in candidates:
            verdicts.append(self._judge(candidate.text, candidate.answer))
            advance(1)
        return verdicts

    def _judge(self, text: str, answer: str) -> Verdict:
        if len(text) > self.max_problem_chars:
            return Verdict(
                "too_long", f"a problem of {len(text):,} characters; the limit is {self.max_problem_chars:,}"
            )
        if len(answer) > self.max_answer_chars:
            return Verdict(
                "too_long", f"an answer of {len(answer):,} characters; the limit is {self.max_answer_chars:,}"
            )
        if found := choice(text, answer):
            return Verdict("multiple_choice", found)
        if found := proof(text, answer):
            return Verdict("proof", found)
        if is_prose(answer):
            return Verdict("prose_answer", f"the answer {answer!r} is a sentence, not a value")
        return STAYS


_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_LABELS = (
    r"(?<![\w)])\(\s*{}\s*\)",  # (A) text, but not P(A)
    r"^\W*{}\s*[.):]\s",  # A. or A) at the beginning of a line
    r"\\text(?:bf|rm)?\s*\{{\s*\(?{}[.):]?\)?\s*\}}",  # \textbf{{A.}} text
)
_OPTIONS = [[re.compile(label.format(letter), re.MULTILINE) for letter in "ABC"] for label in _LABELS]
_LETTER = re.compile(r"\W*(?:\\(?:text|mathrm|textbf|mathbf)\W*)?\(?\s*[A-E]\s*\)?\W*")
_ASKS_FOR_A_LETTER = re.compile(
    r"\b(?:which (?:one )?of the following|letters? of (?:the|your|all)|select the|choose the (?:correct|best))\b",
    re.IGNORECASE,
)
_TWO_OPTIONS = re.compile(r"\W*(?:\\text\W*)?(?:yes|no|true|false)\W*", re.IGNORECASE)


def choice(text: str, answer: str) -> str:
    """How the problem shows that its answer is one of a few; empty where it does not."""
    body = _FIGURE.sub(" ", text)
    if any(_in_order(body, labels) for labels in _OPTIONS):
        return "lists options to choose from"
    if _LETTER.fullmatch(answer) and _ASKS_FOR_A_LETTER.search(body):
        return f"the answer {answer!r} is the letter of an option"
    if _TWO_OPTIONS.fullmatch(answer):
        return f"the answer {answer!r} is one of two"
    return ""


def _in_order(text: str, patterns: Sequence[re.Pattern[str]]) -> bool:
    """Whether each pattern matches after the one before. One search each, as a pattern of all three would backtrack."""
    position = 0
    for pattern in patterns:
        if (match := pattern.search(text, position)) is None:
            return False
        position = match.end()
    return True


_PROOF = re.compile(
    r"\b(?:prove|disprove|show|demonstrate|verify|justify)\b(?:\s*,[^,]{0,80},)?\s+(?:that|why|the|if|whether|each|every)\b"
    r"|\bprove\s*:|证明|求证",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"\b(?:find|compute|calculate|determine|evaluate|what|how (?:many|much|long|far|old)|which|express|simplify)\b"
    r"|求出|多少",
    re.IGNORECASE,
)
_PROOF_ANSWER = re.compile(
    r"\W*(?:text\W*)?(?:proof|proved|proven|qed|q\.e\.d|see (?:the )?(?:proof|solution)|(?:black)?square$)\b.*",
    re.IGNORECASE | re.DOTALL,
)


def proof(text: str, answer: str) -> str:
    """How the problem shows that it wants an argument; empty where it does not."""
    if _PROOF_ANSWER.fullmatch(answer):
        return f"the answer {answer!r} stands for a proof"
    if (asked := _PROOF.search(text)) and not _QUESTION.search(text):
        return f"asks for a proof ({asked[0]!r}) and for nothing else"
    return ""


_MARKUP = re.compile(r"\\[a-zA-Z]+|\$")
_WORD = re.compile(r"[^\W\d_]{2,}")
MAX_ANSWER_WORDS = 2
"""`5 square meters` is a value, `any even number` is not one: units follow a number and do not count."""
_UNITS = re.compile(r"(?<=\d)[\s}]*(?:\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|[a-z ]+$)", re.IGNORECASE)


def is_prose(answer: str) -> bool:
    """Whether the answer is a sentence, of which no verifier can tell what else would say the same."""
    return len(_WORD.findall(_MARKUP.sub(" ", _UNITS.sub(" ", answer)))) > MAX_ANSWER_WORDS
