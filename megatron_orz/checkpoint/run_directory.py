"""What a run finds in its directory: nothing, a run of the same recipe to go on with, or one to leave alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from megatron_orz.checkpoint.manifest import Manifest
from megatron_orz.checkpoint.recipe import differences
from megatron_orz.checkpoint.store import CheckpointStore
from megatron_orz.config import RunConfig
from megatron_orz.logs import METRICS_FILE, set_aside, writing
from megatron_orz.ranks import Ranks
from megatron_orz.whole_file import whole_file

FINISHED_FILE = "finished"
"""Holds the number of steps of a run that has done them all, and has left its final checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """The directory of this run, which no other process uses."""

    path: Path
    num_steps: int
    """Of the whole run."""
    store: CheckpointStore
    resumed: Manifest | None
    """The checkpoint to go on from; None for a run that begins."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        file = self.path / FINISHED_FILE
        if self.resumed is None or self.resumed.progress.step < self.num_steps or not file.exists():
            return False
        return file.read_text().strip() == str(self.num_steps)

    def mark_finished(self) -> None:
        """Notes, on the main rank, that all is done."""
        path = self.path / FINISHED_FILE
        with writing(path), whole_file(path) as file:
            file.write(f"{self.num_steps}\n".encode())


@contextlib.contextmanager
def open_run_directory(
    config: RunConfig, recipe: Mapping[str, Any], ranks: Ranks, say: Callable[[str], None], *, num_steps: int
) -> Iterator[RunDirectory]:
    """Locks `config.run_dir` for this run and finds its last sound checkpoint. Collective.

    What a run without a checkpoint left there is set aside; so is everything with `config.fresh`.
    recipe: `recipe_of` the config. num_steps: of the whole run.
    say: is told on rank 0 what was found.

    Raises ValueError when a live run uses the directory, its checkpoints are of another recipe, or all damaged.
    """
    run_dir = config.run_dir
    with contextlib.ExitStack() as stack:
        with ranks.share_fate("preparing the run directory"):
            if ranks.rank == 0:
                stack.enter_context(_lock(run_dir))
                if config.fresh:
                    _begin_anew(run_dir, stack, say)
        store = CheckpointStore(run_dir / "checkpoints", config.checkpoint, recipe=recipe, ranks=ranks)
        resumed = store.newest_sound(say)
        with ranks.share_fate("preparing the run directory"):
            if resumed is not None:
                _check_recipe(config, recipe, resumed, num_steps)
            elif ranks.rank == 0 and _holds_rows(run_dir):
                _begin_anew(run_dir, stack, say)
        yield RunDirectory(path=run_dir, num_steps=num_steps, store=store, resumed=resumed)


def _lock(run_dir: Path) -> contextlib.AbstractContextManager[object]:
    """Held until the end of the process at the latest, however it ends."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(run_dir / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{run_dir} is in use by a live run; wait for it, or set run_dir") from error


def _begin_anew(run_dir: Path, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
    if old_run := set_aside(run_dir):
        say(f"the run that was in {run_dir} is now in {old_run}")
        stack.enter_context(_lock(run_dir))


def _holds_rows(run_dir: Path) -> bool:
    file = run_dir / METRICS_FILE
    return file.exists() and file.stat().st_size > 0


def _check_recipe(config: RunConfig, recipe: Mapping[str, Any], resumed: Manifest, num_steps: int) -> None:
    if (num_done := resumed.progress.step) > num_steps:
        raise ValueError(
            f"{config.run_dir} holds a run of {num_done} steps, more than ppo.num_steps {num_steps}; raise it, set "
            "run_dir, or begin anew with --fresh"
        )
    if found := differences(recipe, resumed.recipe):
        raise ValueError(
            f"{config.run_dir} holds a run of another recipe: {'; '.join(found)}; restore the recipe, set run_dir, "
            "or begin anew with --fresh"
        )
