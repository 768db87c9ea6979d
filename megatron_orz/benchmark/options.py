"""What the options of all benchmarks are checked for."""

from __future__ import annotations


def check_positive(arguments: object, *names: str) -> None:
    """Raises ValueError when one of these options is given and less than 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
