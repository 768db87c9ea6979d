"""The training curves of one or more runs, drawn into a picture from their metrics files.

Runs whose directories are named alike but for a seed at the end (`grpo-seed0`, `grpo-seed1`, or `grpo/seed0`) are drawn
as one: the mean over them, and a band of one standard deviation to either side.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from megatron_orz.logs import read_metrics
from megatron_orz.types import Metrics
from megatron_orz.whole_file import whole_file

Run: TypeAlias = Sequence[Metrics]
"""The rows of one metrics file."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric over the steps, and others beside it in other strokes."""

    title: str
    unit: str
    metric: str
    dashed: str | None = None
    faint: str | None = None
    log_scale: bool = False
    lowest: float | None = None
    """Values below it are left to lie outside: one of them would flatten the rest."""


PANELS = {
    "R": Panel(title="Reward", unit="mean over responses", metric="reward/mean"),
    "P": Panel(title="pass@n over a step's prompts", unit="share of prompts", metric="reward/pass@n"),
    "L": Panel(
        title="Response length (faint: longest)",
        unit="tokens",
        metric="response/length_mean",
        faint="response/length_max",
    ),
    "A": Panel(
        title="Length of right answers (dashed: wrong)",
        unit="tokens",
        metric="response/correct_length_mean",
        dashed="response/wrong_length_mean",
    ),
    "F": Panel(
        title="Well formatted (dashed: truncated)",
        unit="share of responses",
        metric="response/format_share",
        dashed="response/truncated_share",
    ),
    "W": Panel(title="Reflecting responses", unit="share of responses", metric="response/reflection_share"),
    "C": Panel(
        title="Right and reflecting: length (dashed: right)",
        unit="tokens",
        metric="response/correct_reflection_length_mean",
        dashed="response/correct_length_mean",
    ),
    "S": Panel(title="Repetition", unit="share of substrings", metric="response/repetition_mean"),
    "E": Panel(title="Policy entropy", unit="nats per token", metric="policy/entropy"),
    "K": Panel(
        title="Clipped: policy (dashed: critic)",
        unit="share of tokens",
        metric="policy/clip_share",
        dashed="critic/clip_share",
    ),
    "V": Panel(title="Value loss", unit="half squared error", metric="critic/loss"),
    "X": Panel(
        title="Explained variance of the critic",
        unit="1 - Var(R - V) / Var(R)",
        metric="critic/explained_variance",
        lowest=-1.0,
    ),
    "D": Panel(
        title="Unwhitened advantages (dashed: std)",
        unit="mean over tokens",
        metric="advantage/mean",
        dashed="advantage/std",
    ),
    "B": Panel(title="Positive advantages", unit="share of tokens", metric="advantage/positive_share"),
    "M": Panel(
        title="Trainer against server (faint: largest)",
        unit="|difference of log-probs|",
        metric="log_prob_mismatch/mean",
        faint="log_prob_mismatch/max",
        log_scale=True,
    ),
}
LAYOUT = "RRPL;AFWC;SEKV;XDBM"
COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8e6bbf", "#c79a2b", "#5b6770")
MARKERS = "osD^vP"
SEED = re.compile(r"[-_.]?seed[-_.=]?\d+$")


def draw_curves(metrics_paths: Path | Sequence[Path], picture: Path) -> None:
    """Draws metrics.jsonl files, a colour for each run or group of seeds; several are named after their directories.

    Held-out scores are points on the reward panel. A metric that was never logged leaves its panel empty. The suffix of
    `picture` picks its format.
    """
    paths = [metrics_paths] if isinstance(metrics_paths, Path) else metrics_paths
    figure = Figure(figsize=(17, 12.5), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic(LAYOUT)
    for letter, panel in PANELS.items():
        style_axes(axes[letter], panel)
    groups = group_seeds(paths)
    for i, (name, members) in enumerate(groups.items()):
        runs = [read_metrics(path) for path in members]
        color = COLORS[i % len(COLORS)]
        label = "training" if len(paths) == 1 else f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name
        for letter, panel in PANELS.items():
            draw_panel(axes[letter], runs, panel, color=color, label=label)
        _draw_held_out(axes["R"], runs, color=color)
    for letter, panel in PANELS.items():
        if panel.lowest is not None and axes[letter].get_ylim()[0] < panel.lowest:
            axes[letter].set_ylim(bottom=panel.lowest)
    if axes["R"].get_legend_handles_labels()[0]:
        axes["R"].legend(loc="best", frameon=False, fontsize=9)
    write_picture(figure, picture)


def group_seeds(paths: Sequence[Path]) -> Mapping[str, Sequence[Path]]:
    """Metrics files by the name of their run without its seed, in the order of the first of each."""
    groups: defaultdict[str, list[Path]] = defaultdict(list)
    for path in paths:
        run_dir = path.absolute().parent
        groups[SEED.sub("", run_dir.name) or run_dir.parent.name].append(path)
    return groups


def mean_over_runs(runs: Sequence[Run], metric: str) -> tuple[list[float], list[float], list[float]]:
    """Steps, means and sample standard deviations of a metric over the runs that measured it as a number there.

    The deviation of a single run is 0.
    """
    values: defaultdict[float, list[float]] = defaultdict(list)
    for row in (row for run in runs for row in run):
        if not math.isnan(row.get(metric, math.nan)):
            values[row["step"]].append(row[metric])
    steps = sorted(values)
    deviations = [stdev(values[step]) if len(values[step]) > 1 else 0.0 for step in steps]
    return steps, [fmean(values[step]) for step in steps], deviations


def draw_panel(axes: Axes, runs: Sequence[Run], panel: Panel, *, color: str, label: str) -> None:
    """Draws the runs of one group, as their mean and a band of one deviation. `style_axes` comes first."""
    if panel.faint is not None:
        steps, means, _ = mean_over_runs(runs, panel.faint)
        axes.plot(steps, means, color=color, alpha=0.3, linewidth=1)
    for metric, linestyle in ((panel.dashed, "--"), (panel.metric, "-")):
        steps, means, deviations = mean_over_runs(runs, metric) if metric is not None else ([], [], [])
        if not steps:  # an empty line would still claim a place in the legend
            continue
        marker = "." if len(steps) < 30 else ""
        named = label if linestyle == "-" else None
        axes.plot(steps, means, linestyle, color=color, linewidth=1.6, marker=marker, label=named)
        if any(deviations):
            low, high = zip(*((mean - d, mean + d) for mean, d in zip(means, deviations, strict=True)), strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)


def _draw_held_out(axes: Axes, runs: Sequence[Run], *, color: str) -> None:
    """Every `evaluation/<file>/avg@k`, with a marker of its own and a bar of one deviation over the runs."""
    names = {name for run in runs for row in run for name in row}
    scores = sorted(name for name in names if name.startswith("evaluation/") and "avg@" in name)
    for i, name in enumerate(scores):
        steps, means, deviations = mean_over_runs(runs, name)
        axes.errorbar(
            steps,
            means,
            yerr=deviations if any(deviations) else None,
            fmt=MARKERS[i % len(MARKERS)],
            color=color,
            markerfacecolor="white",
            markersize=6.5,
            markeredgewidth=1.6,
            elinewidth=1,
            zorder=3,
            label=f"{name.removeprefix('evaluation/')}, held out",
        )


def write_picture(figure: Figure, picture: Path) -> None:
    """Writes the picture, whole or not at all; its suffix picks the format."""
    with whole_file(picture) as file:
        figure.savefig(file, format=picture.suffix.removeprefix(".") or "png")


def style_axes(axes: Axes, panel: Panel) -> None:
    """Titles, ticks and grid of a panel."""
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(which="both", labelsize=8, length=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02, y=0.08)
    if panel.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(NullFormatter())
