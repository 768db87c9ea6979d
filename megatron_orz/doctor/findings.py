"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["ok", "costly", "broken"]
"""All is well; something is slower or missing; nothing runs."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    verdict: Verdict
    found: str
    cost: str = ""
    """What it costs, where it is not ok."""
    remedy: str = ""


def well(subject: str, found: str) -> Finding:
    """A thing that is as it should be."""
    return Finding(subject=subject, verdict="ok", found=found)


def ill(subject: str, found: str, *, cost: str, remedy: str, is_needed: bool = False) -> Finding:
    """A thing that is not."""
    return Finding(subject=subject, verdict="broken" if is_needed else "costly", found=found, cost=cost, remedy=remedy)
