"""What a simulation found: tables, a picture, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from megatron_orz.simulation.course import Course
from megatron_orz.simulation.profile import Profile
from megatron_orz.simulation.runs import MeasuredRun
from megatron_orz.simulation.sweep import Outcome

Outcomes = Mapping[int, Sequence[Outcome]]
"""By the number of GPUs."""


def outcome_table(profile: Profile, outcomes: Outcomes) -> Table:
    """A line for each mode on each number of GPUs, at its best split; gains are over the first mode."""
    table = Table(title=f"{profile.name}: a step, at the best split of the GPUs")
    for column in ("GPUs", "mode"):
        table.add_column(column, justify="right" if column == "GPUs" else "left", no_wrap=True)
    columns = ("trainer + fleet", "step s", "gain", "train s", "wait s", "sync s", "idle: trainer", "fleet", "all")
    for column in (*columns, "tok/s/GPU", "cost of sync", "stragglers", "spread"):
        table.add_column(column, justify="right")
    for gpus, of_modes in outcomes.items():
        first = of_modes[0].course.step_s
        for outcome in of_modes:
            c, cost = outcome.course, outcome.costs
            s = c.setting
            table.add_row(
                str(gpus),
                outcome.mode.name,
                f"{s.trainer_gpus} shared" if s.colocated else f"{s.trainer_gpus} + {s.server_gpus}",
                f"{c.step_s:.1f}",
                f"{first / c.step_s:.2f} x",
                *(f"{seconds:.1f}" for seconds in (c.train_s, c.wait_s, c.sync_s)),
                *(["-", "-"] if s.colocated else [f"{c.trainer_idle:.0%}", f"{c.fleet_idle:.0%}"]),
                f"{c.gpu_idle:.0%}",
                f"{c.tokens_per_s_per_gpu:,.0f}",
                *(f"{seconds:.1f} s" for seconds in (cost.sync_s, cost.stragglers_s, cost.spread_s)),
                end_section=outcome is of_modes[-1],
            )
    return table


def check_table(pairs: Sequence[tuple[MeasuredRun, Course]]) -> Table:
    """Measured runs beside what is predicted of them: means of their steps."""
    table = Table(title="predicted, and measured")
    table.add_column("run")
    for column in ("prompts x responses", "ahead", "servers", "measured step s", "predicted", "error"):
        table.add_column(column, justify="right")
    for run, course in pairs:
        s = run.setting
        table.add_row(
            run.run_dir.name,
            f"{s.num_prompts} x {s.num_responses}",
            str(s.max_staleness),
            str(run.num_servers),
            f"{run.step_s:.2f}",
            f"{course.step_s:.2f}",
            f"{course.step_s / run.step_s - 1:+.1%}",
        )
    return table


def source_table(profile: Profile) -> Table:
    """Every number of the profile, and where it is from."""
    table = Table("what", "value", "from", title=f"{profile.name}: what is simulated with")
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
    """Step time over the split of the GPUs, and over their number where there are several; one line for each mode."""
    counts = list(outcomes)
    middle = counts[len(counts) // 2]
    figure = Figure(figsize=(11 if len(counts) > 1 else 7, 4), layout="constrained")
    by_split, *others = figure.subplots(1, min(2, len(counts)), squeeze=False)[0]
    for index, outcome in enumerate(outcomes[middle]):
        name, colour = outcome.mode.name, f"C{index}"
        if outcome.mode.colocated:
            by_split.axhline(outcome.course.step_s, color=colour, linestyle="--", label=name)
        else:
            shares = [course.setting.trainer_gpus / middle for course in outcome.tried]
            by_split.plot(shares, [course.step_s for course in outcome.tried], marker="o", color=colour, label=name)
        for by_gpus in others:
            steps = [of_modes[index].course.step_s for of_modes in outcomes.values()]
            by_gpus.plot(counts, steps, marker="o", color=colour)
    by_split.set(yscale="log", xlabel="share of the trainer", ylabel="seconds a step", title=f"{middle} GPUs")
    by_split.legend(loc="upper center")
    for by_gpus in others:
        by_gpus.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="seconds a step", title="at the best split")
        by_gpus.set_xticks(counts, [str(count) for count in counts])
        by_gpus.minorticks_off()
    figure.suptitle(f"{profile.name}, simulated")
    figure.savefig(picture, dpi=120)


def _short(profile: Profile, name: str) -> str:
    value = getattr(profile, name)
    if name == "groups":
        return f"{len(value)} prompts, {profile.mean_response_tokens:.0f} tokens a response"
    if name.endswith("spread"):
        return f"{min(value):.2f} to {max(value):.2f}"
    if dataclasses.is_dataclass(value):
        return ", ".join(f"{field.name} {getattr(value, field.name):.3g}" for field in dataclasses.fields(value))
    return f"{value:.4g}"
