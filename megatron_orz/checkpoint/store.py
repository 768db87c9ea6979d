"""Saving and restoring the parts of a run.

Ranks write their files in a thread while training goes on, one checkpoint at a time. When all have written, rank 0
describes the whole, lists every file's digest in the manifest, and gives the directory its name, which is what makes it
a checkpoint. Every call is collective.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.progress import track

from megatron_orz.checkpoint.directory import CheckpointDirectory, flush
from megatron_orz.checkpoint.hf_export import copy_companions
from megatron_orz.checkpoint.manifest import DamagedCheckpointError, FileDigest, Manifest, Progress
from megatron_orz.config import CheckpointConfig
from megatron_orz.ranks import Ranks
from megatron_orz.types import PendingSave, Stateful


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
    """The checkpoints of one run, written and read by all of its ranks."""

    def __init__(self, path: Path, config: CheckpointConfig, *, recipe: Mapping[str, Any], ranks: Ranks) -> None:
        self._directory = CheckpointDirectory(path)
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
        with self._explained(progress.step):
            directory = self._begin(progress.step, parts)
            # An error of one rank in here ends its process, and with it the collectives the others wait in.
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
            part.load_state(self._directory.of(manifest.progress.step) / name)

    def newest_sound(self, report: Callable[[str], None]) -> Manifest | None:
        """The manifest of the newest checkpoint whose files all have their digests; None where there is none at all.

        report: is told of every damaged one, on rank 0. It is kept under another name.
        Raises ValueError when all of them are damaged.
        """
        is_main = self._ranks.rank == 0
        with self._ranks.share_fate("looking for checkpoints"):
            if is_main:
                self._directory.clean_up()
        damages = []
        for name in self._ranks.broadcast(self._directory.names() if is_main else None):
            manifest, problems = self._examine(self._directory.path / name)
            if manifest is not None and not problems:
                return manifest
            damages.append(f"checkpoint {self._directory.path / name} is damaged: {'; '.join(problems)}")
            if is_main:
                report(f"{damages[-1]}. It is left out, and kept as {self._directory.set_aside(name).name}")
        if damages:
            raise ValueError(
                f"no sound checkpoint is left in {self._directory.path} ({' | '.join(damages)}); "
                "restore the files, or begin anew with --fresh"
            )
        return None

    def _examine(self, checkpoint: Path) -> tuple[Manifest | None, list[str]]:
        """The manifest and what is wrong with the checkpoint; each rank reads a part of the files."""
        found: tuple[Manifest | None, list[str]] | None = None
        if self._ranks.rank == 0:
            try:
                found = Manifest.read(checkpoint), []
            except DamagedCheckpointError as error:
                found = None, [str(error)]
        manifest, problems = self._ranks.broadcast(found)
        if manifest is None:
            return None, problems
        mine = sorted(manifest.files)[self._ranks.rank :: self._ranks.size]
        is_shown = self._ranks.rank == 0 and sys.stdout.isatty()
        problems = [
            f"{name} {problem}"
            for name in track(mine, f"checking {checkpoint.name}", transient=True, disable=not is_shown)
            if (problem := manifest.files[name].problem_of(checkpoint / name))
        ]
        return manifest, [problem for of_rank in self._ranks.gather(problems) for problem in of_rank]

    def _begin(self, step: int, parts: Mapping[str, Stateful]) -> Path:
        directory = None
        with self._ranks.share_fate("making the checkpoint's directory"):
            if self._ranks.rank == 0:
                directory = self._directory.begin(step)
                for name in parts:
                    (directory / name).mkdir()
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
                flush(file)
                digests[name] = FileDigest.of(file)
        manifest = Manifest(
            progress=save.progress,
            world_size=self._ranks.size,
            recipe=self._recipe,
            versions=_versions(),
            files=dict(sorted(digests.items())),
        )
        manifest.write(save.directory)
        self._directory.commit(save.directory, save.progress.step)
        self._directory.thin_out(keep=self._config.keep, keep_every=self._config.keep_every)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Leaves nothing of a save that fails, and says of an OSError what could not be written, and what to do."""
        try:
            yield
        except Exception as error:
            if self._ranks.rank == 0:
                self._directory.clean_up()
            if not isinstance(error, OSError):
                raise
            names = self._directory.names()
            goes_on = f"goes on from {names[0]}" if names else "begins anew"
            raise CheckpointWriteError(
                f"cannot write the checkpoint of step {step} ({error.filename or self._directory.path}: "
                f"{error.strerror or error}); free some space or repair the file system, and run the same command "
                f"again: it {goes_on}"
            ) from error


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
