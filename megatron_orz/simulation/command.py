"""`tools/plan.py simulate`: from measured runs or a named profile to the layout of the next run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from rich.console import Console

from megatron_orz import terminal
from megatron_orz.simulation.course import Course, Setting, simulate
from megatron_orz.simulation.measured import measured_profile
from megatron_orz.simulation.profile import Profile
from megatron_orz.simulation.published import NAMES, published_profile
from megatron_orz.simulation.report import check_table, draw, outcome_markdown, outcome_table, source_table, to_json
from megatron_orz.simulation.runs import MeasuredRun, read_run
from megatron_orz.simulation.sweep import Outcome, best_outcome, modes


@dataclass(frozen=True)
class Arguments:
    """Simulates steps on other numbers of GPUs, other splits of them, and generation beside training."""

    profile: tyro.conf.Positional[tuple[str, ...]]
    """Directories of runs with saved generations, or the name of a published profile."""
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of GPUs; where the runs had none, a GPU is what each of their processes computed on."""
    trainer_gpus: int | None = None
    """GPUs of the trainer; by default those with which a step is shortest."""
    num_prompts: int | None = None
    """Prompts of a step; by default the profile's."""
    num_responses: int | None = None
    """Responses to each; by default the profile's."""
    max_staleness: tuple[int, ...] = (0, 1, 2)
    """Batches asked ahead of the trainer: 0 is synchronous."""
    oversampling: float = 0.25
    """A synchronous mode with this share of prompts in addition; 0 leaves it out."""
    colocated: bool = True
    """A synchronous mode in which servers and trainer share all GPUs."""
    against: tuple[Path, ...] = ()
    """Directories of runs to predict from the profile and to compare: nothing else is simulated then."""
    max_running: int | None = None
    """Responses that a server decodes together; by default the profile's: fleet.max_running of measured runs."""
    num_steps: int = 8
    """Steps simulated, after the first few."""
    seed: int = 0
    """Of the lengths and speeds drawn: equal seeds give equal results."""
    output: Path | None = None
    """Directory of simulation.json, simulation.md and simulation.png; by default none is written."""

    def __post_init__(self) -> None:
        if not self.profile:
            raise ValueError(f"no profile is given; name one of {', '.join(NAMES)}, or directories of runs")
        if not self.gpus or min(self.gpus) < 2:
            raise ValueError(f"gpus {self.gpus} leaves none for a trainer and a server; give numbers of at least 2")
        if not (math.isfinite(self.oversampling) and self.oversampling >= 0):
            raise ValueError(f"oversampling {self.oversampling} is not a share of prompts; 0 leaves it out")


def run(arguments: Arguments, console: Console | None = None) -> None:
    """Prints what the profile is made of, and what it predicts. Raises ValueError for what makes no simulation."""
    console = console or Console()
    profile = load_profile(arguments.profile, max_running=arguments.max_running)
    console.print(source_table(profile))
    outcomes: dict[int, list[Outcome]] = {}
    checked: list[tuple[MeasuredRun, Course]] = []
    if arguments.against:
        runs = [read_run(path) for path in arguments.against]
        steps, seed = arguments.num_steps, arguments.seed
        checked = [
            (run, simulate(profile.with_max_running(run.max_running), run.setting, num_steps=steps, seed=seed))
            for run in runs
        ]
        console.print(check_table(checked))
    else:
        outcomes = simulate_all(profile, arguments)
        console.print(outcome_table(profile, outcomes))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        settings = {"seed": arguments.seed, "num_steps": arguments.num_steps}
        (arguments.output / "simulation.json").write_text(to_json(profile, outcomes, checked, **settings))
        if outcomes:
            (arguments.output / "simulation.md").write_text(outcome_markdown(outcomes))
            draw(profile, outcomes, arguments.output / "simulation.png")
        console.print(f"{arguments.output} holds the figures")


def load_profile(names: Sequence[str], *, max_running: int | None = None) -> Profile:
    """The published profile of that name, or one measured from run directories. Raises ValueError for neither.

    max_running: what servers shall decode together, where they did otherwise.
    """
    if len(names) == 1 and not Path(names[0]).is_dir():
        return published_profile(names[0]).with_max_running(max_running)
    for name in names:
        if not Path(name).is_dir():
            raise ValueError(f"{name} is no directory; give those of runs, or one of {', '.join(NAMES)} alone")
    runs = [read_run(Path(name)) for name in names]
    return measured_profile(runs, max_running=max_running).with_max_running(max_running)


def simulate_all(profile: Profile, arguments: Arguments) -> dict[int, list[Outcome]]:
    """Every mode on every number of GPUs."""
    base = Setting(
        trainer_gpus=profile.gpus_per_replica,
        server_gpus=profile.gpus_per_server,
        num_prompts=profile.num_prompts if arguments.num_prompts is None else arguments.num_prompts,
        num_responses=profile.num_responses if arguments.num_responses is None else arguments.num_responses,
    )
    compared = modes(
        max_staleness=arguments.max_staleness, oversampling=arguments.oversampling, colocated=arguments.colocated
    )
    outcomes: dict[int, list[Outcome]] = {gpus: [] for gpus in arguments.gpus}
    with terminal.progress() as progress:
        task = progress.add_task("simulating", total=len(outcomes) * len(compared))
        for gpus, mode in product(outcomes, compared):
            progress.update(task, description=f"{gpus} GPUs, {mode.name}")
            outcomes[gpus].append(
                best_outcome(
                    profile,
                    mode,
                    base,
                    gpus=gpus,
                    trainer_gpus=arguments.trainer_gpus,
                    num_steps=arguments.num_steps,
                    seed=arguments.seed,
                )
            )
            progress.advance(task)
    return outcomes
