"""How every run starts, of either kind: its watchdog, ranks, directory, log, and what it goes on from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_orz.checkpoint.manifest import Progress
from megatron_orz.checkpoint.preemption import Preemption
from megatron_orz.checkpoint.run_directory import RunDirectory, open_run_directory
from megatron_orz.config import RunConfig
from megatron_orz.engine.parallel import Mesh, open_mesh
from megatron_orz.logs import LogPosition, RunLog
from megatron_orz.ranks import Ranks
from megatron_orz.types import Stateful
from megatron_orz.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """What is there before any model is built."""

    mesh: Mesh
    ranks: Ranks
    directory: RunDirectory
    done: Progress
    log: RunLog
    preemption: Preemption

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.ranks.rank == 0

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Takes up the state of every part where the run goes on from a checkpoint."""
        if self.directory.resumed is not None:
            with self.log.console.status("loading the checkpoint"):
                self.directory.store.restore(self.directory.resumed, parts)


def start_run(
    stack: contextlib.ExitStack,
    config: RunConfig,
    recipe: Mapping[str, Any],
    *,
    num_steps: int,
    deterministic: bool = False,
) -> StartedRun | None:
    """Starts a run on every rank; `stack` ends it. None where the directory holds this run, finished.

    recipe: what makes two runs the same (`checkpoint/recipe.py`). num_steps: of the whole run.
    """
    watchdog = stack.enter_context(Watchdog(config.run_dir, timeout_s=config.hang_timeout_s))
    mesh = stack.enter_context(open_mesh(config.parallel, seed=config.seed, deterministic=deterministic))
    stack.enter_context(watchdog.watching_peers())
    ranks = stack.enter_context(Ranks())
    is_main = ranks.rank == 0
    say = partial(print, flush=True)
    directory = stack.enter_context(open_run_directory(config, recipe, ranks, say, num_steps=num_steps))
    if directory.is_finished:
        return None
    resumed = directory.resumed
    if resumed is not None and is_main:
        say(f"going on from the checkpoint after {resumed.progress.step} steps")
    done = resumed.progress if resumed else Progress(step=0, prompt_cursor=0, metrics_bytes=0)
    with ranks.share_fate("opening the log"):
        log = stack.enter_context(
            RunLog(
                config.run_dir,
                num_steps=num_steps,
                is_main=is_main,
                goes_on_at=LogPosition(done.step, done.metrics_bytes),
                on_progress=watchdog.progress,
            )
        )
        log.write_config(config)
        log.start_trackers(config)
    preemption = stack.enter_context(Preemption(ranks, grace_s=config.checkpoint.grace_s, say=say))
    return StartedRun(mesh=mesh, ranks=ranks, directory=directory, done=done, log=log, preemption=preemption)
