"""Trains named variants of a recipe with several seeds each, and compares them.

python tools/ablate.py --list
python tools/ablate.py --sets gae-lambda kl --seeds 0 1 2
python tools/ablate.py --sets algorithms --steps 16 -- --fleet.kind local --ppo.num-prompts 32
python tools/ablate.py --recipe examples/orz_0p5b.py --num-ranks 8 --sets kl --output runs/kl-0p5b
python tools/ablate.py --sets gae-lambda kl --seeds 0 1 2 --draw-only

What follows `--` are options of the recipe, for every run. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.markup import escape
from rich.progress import Progress

from megatron_orz import terminal
from megatron_orz.ablation.pictures import draw
from megatron_orz.ablation.plan import Plan, Run, check, check_directories, make_plan
from megatron_orz.ablation.report import as_json, markdown
from megatron_orz.ablation.results import read_results, read_run
from megatron_orz.ablation.runs import command, make
from megatron_orz.ablation.sets import SETS
from megatron_orz.benchmark.environment import describe
from megatron_orz.command_line import plain_errors, read_command, split_options
from megatron_orz.json_file import write_json
from megatron_orz.recipe_file import read_recipe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Trains named variants of a recipe with several seeds each, and compares them."""

    sets: tuple[str, ...] = tuple(SETS)
    """Sets of variants; --list shows them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each."""
    steps: int | None = None
    """PPO steps of every run; by default the recipe's."""
    recipe: Path = Path("examples/demo.py")
    """A recipe's file. Its models and data have to be there."""
    num_ranks: int = 1
    """Ranks of a run: more than one are started by torchrun."""
    output: Path = Path("runs/ablations")
    """A run directory for each run, ablations.json, ablations.md, and a picture for each set."""
    run_timeout_s: float = 86400.0
    """A run that takes longer counts as failed."""
    draw_only: bool = False
    """Train nothing; compare the runs that are finished."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Show the sets and stop."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sets if name not in SETS]:
            raise ValueError(f"--sets {' '.join(unknown)} is unknown; choose among {', '.join(SETS)}")
        if self.num_ranks < 1:
            raise ValueError(f"--num-ranks {self.num_ranks} is not at least 1")
        if self.run_timeout_s <= 0:
            raise ValueError(f"--run-timeout-s {self.run_timeout_s:g} is not positive")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run in progress as an interrupt does
    with plain_errors():
        own, options = split_options(sys.argv[1:])
        arguments = read_command(Arguments, own)
        if arguments.show:
            show_sets()
            return
        if arguments.steps is not None:
            options = [*options, "--ppo.num-steps", str(arguments.steps)]
        recipe = read_recipe(arguments.recipe)
        plan = make_plan(recipe, sets=arguments.sets, seeds=arguments.seeds, output=arguments.output, options=options)
        failures = {} if arguments.draw_only else make_all(plan, arguments)
        check_directories(plan)
        if any(run.is_finished for run in plan.runs):
            compare(plan, arguments)
        elif arguments.draw_only:
            raise ValueError(f"{arguments.output} holds no finished run of these sets; leave --draw-only out")
        if failures:
            raise RuntimeError("; ".join(f"{name} failed: {reason}" for name, reason in failures.items()))


def show_sets() -> None:
    for name, ablation_set in SETS.items():
        table = terminal.table(f"{name}: {ablation_set.question}", ["variant", "options"])
        for variant, options in ablation_set.variants.items():
            table.add_row(variant, options or "(the recipe as it is)")
        terminal.console().print(table)


def make_all(plan: Plan, arguments: Arguments) -> dict[str, str]:
    """Makes all runs that are not finished; the reasons of those that failed, by name."""
    check(plan, num_ranks=arguments.num_ranks)
    console = terminal.console()
    failures: dict[str, str] = {}
    with terminal.progress(console) as progress:
        all_runs = progress.add_task("runs", total=len(plan.runs))
        for place, run in enumerate(plan.runs, start=1):
            reason = None if run.is_finished else make_one(run, arguments, progress)
            if reason is not None:
                failures[run.full_name] = reason
            outcome = summary(run, plan.score) if reason is None else f"failed: {reason}"
            console.print(f"{place}/{len(plan.runs)} {run.full_name}  {escape(outcome)}", soft_wrap=True)
            progress.advance(all_runs)
    return failures


def make_one(run: Run, arguments: Arguments, progress: Progress) -> str | None:
    """Makes a run, with a bar of its steps. Returns why it failed, and None if it did not."""
    steps = progress.add_task(run.full_name, total=run.config.ppo.num_steps)
    try:
        return make(
            run,
            command(arguments.recipe, run, num_ranks=arguments.num_ranks),
            timeout_s=arguments.run_timeout_s,
            on_steps=lambda num_steps: progress.update(steps, completed=num_steps),
        )
    finally:
        progress.remove_task(steps)


def summary(run: Run, score: str) -> str:
    result = read_run(run, score)
    change = f"{100 * result.first_score:.1f} % -> {100 * result.last_score:.1f} %"
    return f"held out {change} in {result.train_s:.0f} s of training"


def compare(plan: Plan, arguments: Arguments) -> None:
    """Writes tables, JSON and pictures of the finished runs."""
    results = read_results(plan)
    if missing := [run.full_name for run in plan.runs if not run.is_finished]:
        print(f"{len(missing)} of {len(plan.runs)} runs are not finished, and left out: {', '.join(missing)}")
    text = markdown(results)
    (arguments.output / "ablations.md").write_text(text)
    environment = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_json(arguments.output / "ablations.json", {"environment": environment, **as_json(plan, results)})
    for name, rows in results.items():
        draw(plan, name, rows, arguments.output / f"ablation_{name}.png")
    print(text)
    print(f"tables, ablations.json and pictures are in {arguments.output}")


if __name__ == "__main__":
    main()
