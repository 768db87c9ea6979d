"""The training curves of one or more runs, drawn into a PNG from their metrics files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from megatron_orz.logs import read_metrics


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric over the steps, and a second one drawn faintly behind it."""

    title: str
    unit: str
    metric: str
    faint: str | None = None
    log_scale: bool = False


PANELS = {
    "R": Panel(title="Reward", unit="mean over responses", metric="reward/mean"),
    "L": Panel(
        title="Response length (faint: longest)",
        unit="tokens",
        metric="response/length_mean",
        faint="response/length_max",
    ),
    "E": Panel(title="Policy entropy", unit="nats per token", metric="policy/entropy"),
    "V": Panel(title="Value loss", unit="half squared error", metric="critic/loss"),
    "M": Panel(
        title="Trainer against server (faint: largest)",
        unit="|difference of log-probs|",
        metric="log_prob_mismatch/mean",
        faint="log_prob_mismatch/max",
        log_scale=True,
    ),
}
LAYOUT = "RRL;EVM"
COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8e6bbf", "#c79a2b", "#5b6770")
MARKERS = "osD^vP"


def draw_curves(metrics_paths: Path | Sequence[Path], png_path: Path) -> None:
    """Draws metrics.jsonl files, a colour for each; several are named after their directories.

    Held-out scores are points on the reward panel. A metric that was never logged leaves its panel empty.
    """
    paths = [metrics_paths] if isinstance(metrics_paths, Path) else metrics_paths
    figure = Figure(figsize=(13, 7), dpi=120, layout="constrained")
    axes = figure.subplot_mosaic(LAYOUT)
    for letter, panel in PANELS.items():
        _style(axes[letter], panel)
    for i, path in enumerate(paths):
        rows = read_metrics(path)
        color = COLORS[i % len(COLORS)]
        label = path.absolute().parent.name if len(paths) > 1 else "training"
        for letter, panel in PANELS.items():
            _draw_series(axes[letter], rows, panel, color=color, label=label)
        _draw_held_out(axes["R"], rows, color=color)
    if axes["R"].get_legend_handles_labels()[0]:
        axes["R"].legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(png_path)


def _draw_series(axes: Axes, rows: Sequence[dict[str, float]], panel: Panel, *, color: str, label: str) -> None:
    if panel.faint is not None:
        axes.plot(*_points(rows, panel.faint), color=color, alpha=0.3, linewidth=1)
    steps, values = _points(rows, panel.metric)
    if steps:  # an empty line would still claim a place in the legend
        axes.plot(steps, values, color=color, linewidth=1.6, marker="." if len(steps) < 30 else "", label=label)


def _draw_held_out(axes: Axes, rows: Sequence[dict[str, float]], *, color: str) -> None:
    """Every `evaluation/<file>/avg@k`, with a marker of its own."""
    scores = sorted({name for row in rows for name in row if name.startswith("evaluation/") and "avg@" in name})
    for i, name in enumerate(scores):
        axes.scatter(
            *_points(rows, name),
            s=42,
            marker=MARKERS[i % len(MARKERS)],
            facecolor="white",
            edgecolor=color,
            linewidth=1.6,
            zorder=3,
            label=f"{name.removeprefix('evaluation/')}, held out",
        )


def _points(rows: Sequence[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric where it was measured and is a number."""
    points = [(row["step"], row[metric]) for row in rows if not math.isnan(row.get(metric, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _style(axes: Axes, panel: Panel) -> None:
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
