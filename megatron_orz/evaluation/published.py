"""The results of Open-Reasoner-Zero (arXiv 2503.24290): percent right, the mean of 16 samples."""

from __future__ import annotations

PUBLISHED = {
    "ORZ-0.5B": {"AIME24": 1.0, "AIME25": 0.2, "MATH500": 31.0, "GPQA Diamond": 12.1},
    "ORZ-1.5B": {"AIME24": 3.5, "AIME25": 1.0, "MATH500": 58.0, "GPQA Diamond": 16.8},
    "ORZ-7B": {"AIME24": 17.9, "AIME25": 15.6, "MATH500": 81.4, "GPQA Diamond": 36.6},
    "ORZ-32B": {"AIME24": 48.1, "AIME25": 36.0, "MATH500": 92.2, "GPQA Diamond": 55.5},
}

_FILE_NAMES = {
    "AIME24": ("aime24", "aime2024"),
    "AIME25": ("aime25", "aime2025"),
    "MATH500": ("math500",),
    "GPQA Diamond": ("gpqa", "gpqadiamond"),
}


def published_name(name: str) -> str | None:
    """What the paper calls the benchmark in a file of this name; None for others."""
    plain = "".join(character for character in name.lower() if character.isalnum())
    return next((title for title, names in _FILE_NAMES.items() if plain in names), None)
