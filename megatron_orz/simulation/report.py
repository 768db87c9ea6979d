"""What a simulation found: tables, a picture, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from megatron_orz import terminal
from megatron_orz.simulation.course import Course
from megatron_orz.simulation.profile import Profile
from megatron_orz.simulation.runs import MeasuredRun
from megatron_orz.simulation.sweep import Outcome

Outcomes = Mapping[int, Sequence[Outcome]]
"""By the number of GPUs."""


def outcome_table(profile: Profile, outcomes: Outcomes) -> Table:
    """A line for each mode on each number of GPUs, at its best split; gains are over the first mode."""
    columns = ("trainer + fleet", "step", "gain", "waits", "idle: trainer", "fleet", "all")
    costs_columns = ("sync costs", "stragglers", "spread")
    title = f"{profile.name}: a step, at the best split of the GPUs"
    table = terminal.table(title, ["GPUs", "mode"], (*columns, *costs_columns))
    for gpus, of_modes in outcomes.items():
        for outcome in of_modes:
            course, costs = outcome.course, outcome.costs
            idle = [course.trainer_idle, course.fleet_idle]
            table.add_row(
                str(gpus),
                outcome.mode.name,
                _split(outcome),
                f"{course.step_s:.1f} s",
                f"{of_modes[0].course.step_s / course.step_s:.2f} x",
                f"{course.wait_s:.1f} s",
                *(["-", "-"] if outcome.mode.colocated else [f"{share:.0%}" for share in idle]),
                f"{course.gpu_idle:.0%}",
                f"{costs.sync_s:.1f} s",
                _stragglers(outcome),
                f"{costs.spread_s:.1f} s",
                end_section=outcome is of_modes[-1],
            )
    return table


def outcome_markdown(outcomes: Outcomes) -> str:
    """For a page: a line for each number of GPUs, a column for each mode."""
    tables: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
        ("a step, with trainer + fleet", lambda outcome: f"{outcome.course.step_s:.0f} s, {_split(outcome)}"),
        ("idle: trainer, fleet", _idle),
        ("stragglers cost", _stragglers),
    )
    first = next(iter(outcomes.values()))
    texts = []
    for title, cell in tables:
        rows = [[f"GPUs: {title}", *(outcome.mode.name for outcome in first)], ["---:"] * (1 + len(first))]
        rows += [[str(gpus), *map(cell, of_modes)] for gpus, of_modes in outcomes.items()]
        texts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(texts)


def _split(outcome: Outcome) -> str:
    setting = outcome.course.setting
    return f"{setting.gpus} shared" if setting.colocated else f"{setting.trainer_gpus} + {setting.server_gpus}"


def _idle(outcome: Outcome) -> str:
    """Where both share all GPUs, of these."""
    course = outcome.course
    if outcome.mode.colocated:
        return f"{course.gpu_idle:.0%}"
    return f"{course.trainer_idle:.0%}, {course.fleet_idle:.0%}"


def _stragglers(outcome: Outcome) -> str:
    """Over-sampling trains on other responses, so that nothing can be compared."""
    return "-" if outcome.mode.oversampling else f"{outcome.costs.stragglers_s:.1f} s"


def check_table(pairs: Sequence[tuple[MeasuredRun, Course]]) -> Table:
    """Measured runs beside what is predicted of them: means of their steps."""
    columns = ("prompts x responses", "ahead", "servers", "step s", "error", "train s", "wait s", "sync s")
    table = terminal.table("measured / predicted", ["run"], columns)
    for run, course in pairs:
        s = run.setting
        of_parts = [
            f"{fmean(getattr(step, name) for step in run.steps):.2f} / {getattr(course, name):.2f}"
            for name in ("train_s", "wait_s", "sync_s")
        ]
        table.add_row(
            run.run_dir.name,
            f"{s.num_prompts} x {s.num_responses}",
            str(s.max_staleness),
            str(run.num_servers),
            f"{run.step_s:.2f} / {course.step_s:.2f}",
            f"{course.step_s / run.step_s - 1:+.1%}",
            *of_parts,
        )
    return table


def source_table(profile: Profile) -> Table:
    """Every number of the profile, and where it is from."""
    table = terminal.table(f"{profile.name}: what is simulated with", ["what", "value", "from"])
    for name, source in profile.sources.items():
        table.add_row(name, _short(profile, name), source)
    return table


def to_json(profile: Profile, outcomes: Outcomes, checked: Sequence[tuple[MeasuredRun, Course]], **more: Any) -> str:
    """All of it, for other programs; the profile without the lengths it draws from."""
    described = dataclasses.asdict(profile) | {
        "groups": {"num_groups": len(profile.groups), "mean_response_tokens": profile.mean_response_tokens}
    }
    rows = [
        {"gpus": gpus, **dataclasses.asdict(outcome)} for gpus, of_modes in outcomes.items() for outcome in of_modes
    ]
    checks = [
        {"run": str(run.run_dir), "measured_step_s": run.step_s, **dataclasses.asdict(course)}
        for run, course in checked
    ]
    return json.dumps({"profile": described, "outcomes": rows, "checks": checks, **more}, indent=1) + "\n"


def draw(profile: Profile, outcomes: Outcomes, picture: Path) -> None:
    """Step time over the split of the GPUs; over their number, where there are several, with what is idle and why."""
    counts = list(outcomes)
    rows, columns = (2, 2) if len(counts) > 1 else (1, 1)
    figure = Figure(figsize=(5.5 * columns + 1, 4 * rows), layout="constrained")
    by_split, *by_gpus = figure.subplots(rows, columns, squeeze=False).flat
    _draw_splits(by_split, outcomes, counts[len(counts) // 2])
    panels: tuple[tuple[str, Callable[[Outcome], float]], ...] = (
        ("seconds a step, at the best split", lambda outcome: outcome.course.step_s),
        ("share of all GPUs' time that is idle", lambda outcome: outcome.course.gpu_idle),
        ("share of a step that stragglers cost", _stragglers_share),
    )
    for axes, (label, value) in zip(by_gpus, panels, strict=False):
        for index in range(len(outcomes[counts[0]])):
            axes.plot(counts, [value(of_modes[index]) for of_modes in outcomes.values()], marker="o", color=f"C{index}")
        axes.set(xscale="log", xlabel="GPUs", ylabel=label)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    if by_gpus:
        by_gpus[0].set_yscale("log")
    figure.suptitle(f"{profile.name}, simulated")
    figure.savefig(picture, dpi=110)


def _stragglers_share(outcome: Outcome) -> float:
    return math.nan if outcome.mode.oversampling else outcome.costs.stragglers_s / outcome.course.step_s


def _draw_splits(axes: Axes, outcomes: Outcomes, gpus: int) -> None:
    for index, outcome in enumerate(outcomes[gpus]):
        name, colour = outcome.mode.name, f"C{index}"
        if outcome.mode.colocated:
            axes.axhline(outcome.course.step_s, color=colour, linestyle="--", label=name)
        else:
            shares = [course.setting.trainer_gpus / gpus for course in outcome.tried]
            axes.plot(shares, [course.step_s for course in outcome.tried], marker="o", color=colour, label=name)
    axes.set(yscale="log", xlabel="share of the trainer", ylabel="seconds a step", title=f"{gpus} GPUs")
    axes.legend(loc="upper center")


def _short(profile: Profile, name: str) -> str:
    value = getattr(profile, name)
    if name == "groups":
        return f"{len(value)} prompts, {profile.mean_response_tokens:.0f} tokens a response"
    if name.endswith("spread"):
        return f"{min(value):.2f} to {max(value):.2f}"
    if dataclasses.is_dataclass(value):
        return ", ".join(f"{field.name} {getattr(value, field.name):.3g}" for field in dataclasses.fields(value))
    return f"{value:.4g}"
