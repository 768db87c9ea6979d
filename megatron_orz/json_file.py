"""JSON files: those that others wrote, which may hold anything, and our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_orz.whole_file import whole_file


def read_json(file: Path) -> Any:
    """What the file holds. Raises ValueError that names the file where it cannot be read or is not JSON."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    return parse_json(content, str(file))


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(file) as unfinished:
        unfinished.write(json.dumps(value, indent=2).encode() + b"\n")


def parse_json(content: bytes, place: str) -> Any:
    """What a JSON text says. Raises ValueError that begins with `place` where it is not JSON.

    That includes what Python's parser gives up on: brackets nested by the thousand, integers of thousands of digits.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error})") from error
