"""What the sections of a config check themselves with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

MAX_TIMEOUT_S = 1e6
"""The longest deadline, eleven days: some waits count milliseconds in 32 bits."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_numbers(section: Any, place: str = "") -> None:
    """Raises ValueError for what is not a finite number or a deadline that comes, in a section and those below."""
    for field_ in dataclasses.fields(section):
        name, value = f"{place}{field_.name}", getattr(section, field_.name)
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{name}.")
        elif isinstance(value, float):
            require(math.isfinite(value), f"{name} {value} is not a finite number")
        if name.endswith("timeout_s"):
            require(
                0 < value <= MAX_TIMEOUT_S, f"{name} {value:g} is not a deadline: it must be above 0, and at most 1e6 s"
            )
