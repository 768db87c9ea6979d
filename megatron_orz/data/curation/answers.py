"""Whether the verifier can tell a reference answer from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from megatron_orz.data.curation.stage import STAYS, Advance, Candidate, Verdict

Recognise: TypeAlias = Callable[[Sequence[str]], Sequence[bool | None]]
"""Whether the verifier reads each answer as a value that equals itself; None past its deadline."""

_CHUNK = 1000


def judge_answers(candidates: Sequence[Candidate], advance: Advance, *, recognise: Recognise) -> list[Verdict]:
    """Reasons: `unverifiable`, `verifier_timeout`. Every answer is looked at once, however many problems have it."""
    answers = list(dict.fromkeys(candidate.answer for candidate in candidates))
    share = len(candidates) / max(1, len(answers))
    verdicts: dict[str, Verdict] = {}
    for start in range(0, len(answers), _CHUNK):
        chunk = answers[start : start + _CHUNK]
        verdicts.update(zip(chunk, map(_verdict, chunk, recognise(chunk)), strict=True))
        advance(int(share * (start + len(chunk))) - int(share * start))
    return [verdicts[candidate.answer] for candidate in candidates]


def _verdict(answer: str, is_recognised: bool | None) -> Verdict:
    if is_recognised is None:
        return Verdict("verifier_timeout", f"the verifier does not come to an end with the answer {answer!r}")
    return STAYS if is_recognised else Verdict("unverifiable", f"the verifier cannot read the answer {answer!r}")
