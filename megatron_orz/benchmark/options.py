"""What the options of all benchmarks are checked for."""

from __future__ import annotations


def check_positive(arguments: object, *names: str) -> None:
    """Raises ValueError when one of these options is less than 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}; give at least 1")
