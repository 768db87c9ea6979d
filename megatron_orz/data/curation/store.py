"""Finished work on disk: a table for each piece, with a key that says what it was made of.

A piece whose key is unchanged is read, any other is made anew, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_orz.whole_file import whole_file

_KEY = b"key"


class Store:
    """Tables in a directory, by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, name: str, key: str) -> pyarrow.Table | None:
        """The table, if it is there, whole, and of this key."""
        try:
            table = parquet.read_table(self._path(name))
        except (OSError, pyarrow.ArrowException):
            return None
        return table if (table.schema.metadata or {}).get(_KEY) == key.encode() else None

    def write(self, name: str, key: str, table: pyarrow.Table) -> None:
        """Puts the table in place, whole or not at all."""
        self._path(name).parent.mkdir(parents=True, exist_ok=True)
        keyed = table.replace_schema_metadata({_KEY: key.encode()})
        with whole_file(self._path(name)) as file:
            parquet.write_table(keyed, file, compression="zstd")

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.parquet"


def digest(*parts: Any) -> str:
    """A key of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """A key of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
