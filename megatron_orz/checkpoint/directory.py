"""Checkpoints as directories: one appears whole under its name, and leaves it whole.

checkpoints/
  step-00000040/        a checkpoint: a directory for each part, and manifest.json
  latest                a link to the newest one, set last
  damaged-step-...      what was found damaged
  .step-00000050.*      unfinished, or on its way out
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

LATEST = "latest"


class CheckpointDirectory:
    """The directory that holds a run's checkpoints; one process changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, step: int) -> Path:
        """Where the checkpoint after so many steps is."""
        return self.path / f"step-{step:08d}"

    def names(self) -> list[str]:
        """Checkpoints, the newest first."""
        return sorted((path.name for path in self.path.glob("step-*")), reverse=True)

    def begin(self, step: int) -> Path:
        """An empty directory to fill, under a name that no process of an earlier attempt knows."""
        unfinished = self._hidden(self.of(step))
        unfinished.mkdir(parents=True)
        return unfinished

    def commit(self, unfinished: Path, step: int) -> None:
        """Makes a directory, whose files are on disk, the checkpoint of its step."""
        for directory in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
            flush(directory)
        target = self.of(step)
        if target.exists():  # of a run that went on from an older one
            self.discard(target)
        unfinished.rename(target)
        flush(self.path)
        link = self.path / f".{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.path / LATEST)
        flush(self.path)

    def thin_out(self, *, keep: int, keep_every: int) -> None:
        """Keeps the newest `keep`, and those of every `keep_every`-th step; 0 keeps none of these."""
        for name in self.names()[keep:]:
            if not (keep_every and int(name.removeprefix("step-")) % keep_every == 0):
                self.discard(self.path / name)

    def discard(self, checkpoint: Path) -> None:
        """Removes a checkpoint. Half of one never stands under its name."""
        leaving = self._hidden(checkpoint)
        checkpoint.rename(leaving)
        shutil.rmtree(leaving)

    def set_aside(self, name: str) -> Path:
        """Renames a damaged checkpoint. Returns where it went."""
        target = self.path / f"damaged-{name}"
        shutil.rmtree(target, ignore_errors=True)
        (self.path / name).rename(target)
        return target

    def clean_up(self) -> None:
        """Removes what a killed run left unfinished, or half removed."""
        for leftover in self.path.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _hidden(self, checkpoint: Path) -> Path:
        return checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}")


def flush(path: Path) -> None:
    """Brings a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
