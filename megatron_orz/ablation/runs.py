"""Runs in processes of their own, one after another: what one of them breaks is its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_orz.ablation.plan import Run

POLL_S = 1.0
KILL_S = 30.0
"""After a run's own grace for its last checkpoint."""


def command(recipe: Path, run: Run, *, num_ranks: int) -> list[str]:
    """The command that makes the run."""
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    return [*launcher, str(recipe), *run.options]


def log_path(run: Run) -> Path:
    """What the run prints: beside its directory, which may be set aside."""
    return run.config.run_dir.with_name(f"{run.config.run_dir.name}.log")


def make(run: Run, arguments: Sequence[str], *, timeout_s: float, on_steps: Callable[[int], None]) -> str | None:
    """Starts the run, or goes on with it, and waits for its end. Returns why it failed, and None if it did not.

    timeout_s: after which it is stopped. on_steps: called about every second with the number of rows in its log.
    Whatever ends the wait, an interrupt too, the run is ended first, and saves what it can.
    """
    log = log_path(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                    break
                on_steps(num_rows(run.metrics_path))
                if time.monotonic() > deadline:
                    return f"stopped after {timeout_s:g} s; raise --run-timeout-s, and see {log}"
        finally:
            _stop(process, run.config.checkpoint.grace_s + KILL_S)
    if process.returncode == 0:
        return None
    return f"exit code {process.returncode}: {_last_line(log, start)}; see {log}"


def num_rows(metrics: Path) -> int:
    """Whole rows of a metrics file, which need not be there."""
    try:
        return metrics.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Asks the processes of a run to end, and kills those that do not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(KILL_S)


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
