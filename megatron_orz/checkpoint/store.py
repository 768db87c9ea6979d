"""The checkpoints of a run: written whole or not at all, proved sound before one is used, thinned out.

    checkpoints/
      step-00000040/        a checkpoint: a directory for each part, and manifest.json
      latest                a link to the newest one, set last
      .step-00000050.*      unfinished, or on its way out

Ranks write their files in a thread while training goes on, one checkpoint at a time. When all have written, rank 0
describes the whole, lists every file's digest in the manifest, and renames the directory, which is what makes it a
checkpoint. Every call is collective.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_orz.checkpoint.hf_export import copy_companions
from megatron_orz.checkpoint.manifest import DamagedCheckpointError, FileDigest, Manifest, Progress
from megatron_orz.config import CheckpointConfig
from megatron_orz.ranks import Ranks
from megatron_orz.types import PendingSave, Stateful

LATEST = "latest"


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written: says where, why, and what the run can go on from."""


@dataclass
class _Save:
    """A checkpoint that is being written by a thread of each rank."""

    progress: Progress
    directory: Path
    """Where it grows."""
    pending: Mapping[str, PendingSave]
    sources: Mapping[str, Path]
    digests: dict[str, FileDigest] = field(default_factory=dict)
    """Of this rank's files."""
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)

    def _write(self) -> None:
        try:
            for part in self.pending.values():
                for file in part.write():
                    self.digests[str(file.relative_to(self.directory))] = FileDigest.of(file)
        except BaseException as error:  # raised again where the save is finished
            self.error = error


class CheckpointStore:
    """Saves and restores the parts of a run."""

    def __init__(self, directory: Path, config: CheckpointConfig, *, recipe: Mapping[str, Any], ranks: Ranks) -> None:
        self._directory = directory
        self._config = config
        self._recipe = dict(recipe)
        self._ranks = ranks
        self._save: _Save | None = None

    def save(self, progress: Progress, parts: Mapping[str, Stateful], *, sources: Mapping[str, Path]) -> None:
        """Begins a checkpoint, after the one before it is finished.

        sources: model directories whose config and tokenizer go beside the part of this name.
        Raises CheckpointWriteError.
        """
        self.wait()
        directory = self._begin(progress.step, parts)
        # An error of one rank in here ends its process, and with it the collectives the others wait in.
        with self._explained(progress.step):
            pending = {
                name: part.save_state(directory / name, copy=self._config.asynchronous) for name, part in parts.items()
            }
        self._save = _Save(progress, directory, pending, sources)
        self._save.thread.start()
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Finishes the checkpoint that is being written if every rank has written its share."""
        if self._save is not None and not any(self._ranks.gather(self._save.thread.is_alive())):
            self._finish()

    def wait(self) -> None:
        """Finishes the checkpoint that is being written, however long that takes."""
        if self._save is not None:
            self._save.thread.join()
            self._finish()

    def restore(self, manifest: Manifest, parts: Mapping[str, Stateful]) -> None:
        """Takes up the state of every part."""
        for name, part in parts.items():
            part.load_state(self._directory / _name(manifest.progress.step) / name)

    def newest_sound(self, report: Any) -> Manifest | None:
        """The manifest of the newest checkpoint whose files all have their digests; None where there is none at all.

        report: is told of every damaged one, on rank 0. It is kept under another name.
        Raises ValueError when all of them are damaged.
        """
        with self._ranks.share_fate("looking for checkpoints"):
            if self._ranks.rank == 0:
                self._clean_up()
        damages = []
        for name in self._ranks.broadcast(self._names() if self._ranks.rank == 0 else None):
            manifest, problems = self._examine(self._directory / name)
            if manifest is not None and not problems:
                return manifest
            damage = f"checkpoint {self._directory / name} is damaged: {'; '.join(problems)}"
            damages.append(damage)
            if self._ranks.rank == 0:
                report(f"{damage}. It is left out, and kept as damaged-{name}")
                self._set_aside(name)
        if damages:
            raise ValueError(
                f"no sound checkpoint is left in {self._directory} ({' | '.join(damages)}); "
                "restore the files, or begin anew with --fresh"
            )
        return None

    def _examine(self, directory: Path) -> tuple[Manifest | None, list[str]]:
        """The manifest and what is wrong with the checkpoint; each rank reads a part of the files."""
        found: tuple[Manifest | None, list[str]] | None = None
        if self._ranks.rank == 0:
            try:
                found = Manifest.read(directory), []
            except DamagedCheckpointError as error:
                found = None, [str(error)]
        manifest, problems = self._ranks.broadcast(found)
        if manifest is None:
            return None, problems
        mine = sorted(manifest.files)[self._ranks.rank :: self._ranks.size]
        problems = [
            f"{name} {problem}" for name in mine if (problem := manifest.files[name].problem_of(directory / name))
        ]
        return manifest, [problem for of_rank in self._ranks.gather(problems) for problem in of_rank]

    def _begin(self, step: int, parts: Mapping[str, Stateful]) -> Path:
        """Makes the directories of a checkpoint, under a name that no process of an earlier attempt knows."""
        with self._explained(step), self._ranks.share_fate("making the checkpoint's directory"):
            directory = None
            if self._ranks.rank == 0:
                directory = self._directory / f".{_name(step)}.{secrets.token_hex(4)}"
                for name in parts:
                    (directory / name).mkdir(parents=True)
        return self._ranks.broadcast(directory)

    def _finish(self) -> None:
        assert self._save is not None
        save, self._save = self._save, None
        action = "writing the checkpoint"
        with self._explained(save.progress.step):
            with self._ranks.share_fate(action):
                if save.error is not None:
                    raise save.error
            summaries = {name: self._ranks.gather(part.summary) for name, part in save.pending.items()}
            digests = self._ranks.gather(save.digests)
            with self._ranks.share_fate(action):
                if self._ranks.rank == 0:
                    for name, part in save.pending.items():
                        part.finish(summaries[name])
                    self._commit(save, {name: digest for of_rank in digests for name, digest in of_rank.items()})

    def _commit(self, save: _Save, digests: dict[str, FileDigest]) -> None:
        for name, source in save.sources.items():
            copy_companions(source, save.directory / name)
        for file in sorted(path for path in save.directory.rglob("*") if path.is_file()):
            name = str(file.relative_to(save.directory))
            if name not in digests:  # written by this rank on the way, and perhaps not on disk yet
                _flush(file)
                digests[name] = FileDigest.of(file)
        manifest = Manifest(
            progress=save.progress,
            world_size=self._ranks.size,
            recipe=self._recipe,
            versions=_versions(),
            files=dict(sorted(digests.items())),
        )
        manifest.write(save.directory)
        for directory in (*(save.directory / name for name in save.pending), save.directory):
            _flush(directory)
        target = self._directory / _name(save.progress.step)
        if target.exists():  # of a run that went on from an older one
            self._discard(target)
        save.directory.rename(target)
        _flush(self._directory)
        link = self._directory / f".{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self._directory / LATEST)
        _flush(self._directory)
        self._thin_out()

    def _names(self) -> list[str]:
        """Checkpoints, the newest first."""
        return sorted((path.name for path in self._directory.glob("step-*")), reverse=True)

    def _thin_out(self) -> None:
        """Keeps the newest ones, and those of every so many steps."""
        for name in self._names()[self._config.keep :]:
            step = int(name.removeprefix("step-"))
            if not (self._config.keep_every and step % self._config.keep_every == 0):
                self._discard(self._directory / name)

    def _discard(self, checkpoint: Path) -> None:
        """Half of a checkpoint must never stand under its name."""
        leaving = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}")
        checkpoint.rename(leaving)
        shutil.rmtree(leaving)

    def _set_aside(self, name: str) -> None:
        target = self._directory / f"damaged-{name}"
        shutil.rmtree(target, ignore_errors=True)
        (self._directory / name).rename(target)

    def _clean_up(self) -> None:
        for leftover in self._directory.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _explained(self, step: int) -> _Explained:
        return _Explained(self, step)

    def remedy(self) -> str:
        """What the run goes on from when it is started again."""
        names = self._names()
        goes_on = f"goes on from {names[0]}" if names else "begins anew"
        return f"free some space or repair the file system, and run the same command again: it {goes_on}"


class _Explained:
    """Says of an OSError that it was a checkpoint that could not be written, and what to do."""

    def __init__(self, store: CheckpointStore, step: int) -> None:
        self._store, self._step = store, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError):
            where = error.filename or self._store._directory / _name(self._step)
            raise CheckpointWriteError(
                f"cannot write the checkpoint of step {self._step} ({where}: {error.strerror or error}); "
                f"{self._store.remedy()}"
            ) from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def _flush(path: Path) -> None:
    """Brings a file or the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
