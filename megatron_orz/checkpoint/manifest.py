"""The file that makes a checkpoint one: where the run stood, and the digest of every other file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are missing, truncated or altered: says which, and how."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands between two steps."""

    step: int
    """Finished steps, which is the version of the policy."""
    prompt_cursor: int
    """Prompts taken from the stream."""
    metrics_bytes: int
    """Length of metrics.jsonl with the rows of the finished steps."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} {value!r} is not a count")


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What a file has to hold."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileDigest:
        """Reads the file. Raises OSError."""
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return cls(num_bytes=stream.tell(), sha256=digest.hexdigest())

    def problem_of(self, file: Path) -> str | None:
        """What is wrong with the file, in words; None when it is sound."""
        try:
            size = file.stat().st_size
            if size < self.num_bytes:
                return f"is truncated: {size} of {self.num_bytes} bytes"
            if size > self.num_bytes:
                return f"is too long: {size} instead of {self.num_bytes} bytes"
            return None if FileDigest.of(file) == self else "is altered: its SHA-256 is another"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    progress: Progress
    world_size: int
    """Ranks that saved it."""
    recipe: dict[str, Any]
    """Of the run (`recipe.recipe_of`)."""
    versions: dict[str, str]
    """Of Python and the libraries the bits depend on."""
    files: dict[str, FileDigest]
    """By their path inside the checkpoint."""

    def write(self, directory: Path) -> None:
        """Writes the manifest, flushed to the disk, with a digest of itself. Raises OSError."""
        content = asdict(self)
        with (directory / MANIFEST_FILE).open("w") as stream:
            json.dump({"sha256": _digest(content), "content": content}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises DamagedCheckpointError."""
        file = directory / MANIFEST_FILE
        try:
            whole = json.loads(file.read_bytes())
            content = whole["content"]
            if _digest(content) != whole["sha256"]:
                raise DamagedCheckpointError(f"{file} is altered: its SHA-256 is another")
            return cls(
                progress=Progress(**content["progress"]),
                world_size=content["world_size"],
                recipe=dict(content["recipe"]),
                versions=dict(content["versions"]),
                files={name: FileDigest(**digest) for name, digest in content["files"].items()},
            )
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{file} is missing") from error
        except OSError as error:
            raise DamagedCheckpointError(f"{file} cannot be read: {error.strerror}") from error
        except DamagedCheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{file} is not a manifest ({type(error).__name__}: {error})") from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
