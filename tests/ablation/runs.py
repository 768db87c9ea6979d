"""Finished runs with made-up metrics, written by the parts of a run that write the real ones."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from megatron_orz.ablation.plan import Run
from megatron_orz.checkpoint.run_directory import FINISHED_FILE
from megatron_orz.logs import RunLog
from megatron_orz.types import Metrics


def write_run(run: Run, rows: Sequence[Metrics], *, is_finished: bool = True) -> None:
    """Leaves metrics.jsonl, config.json and, of a finished run, the mark of its end."""
    num_steps = run.config.ppo.num_steps
    with RunLog(run.config.run_dir, num_steps=num_steps, console=Console(quiet=True)) as log:
        log.write_config(run.config)
        for step, row in enumerate(rows):
            log.record(step, row)
    if is_finished:
        (run.config.run_dir / FINISHED_FILE).write_text(f"{num_steps}\n")


def rows_of(run: Run, scores: tuple[float, float], *, score: str = "evaluation/held_out/avg@4") -> list[Metrics]:
    """A reward that rises by 0.1 from 0 on, and held-out scores of the first and the last policy."""
    num_steps = run.config.ppo.num_steps
    rows = [{"reward/mean": 0.1 * step, "policy/entropy": 2.0, "time/generate_s": 1.5} for step in range(num_steps)]
    rows[0][score] = scores[0]
    return [*rows, {score: scores[1], "time/evaluate_s": 2.0}]
