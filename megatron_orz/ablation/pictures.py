"""Comparisons as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megatron_orz.ablation.plan import Plan
from megatron_orz.ablation.results import VariantResult
from megatron_orz.ablation.sets import SETS
from megatron_orz.curves import COLORS, PANELS, Panel, draw_panel, style_axes
from megatron_orz.logs import read_metrics

LENGTH = Panel(title="Response length", unit="tokens", metric="response/length_mean")
MISMATCH = Panel(title="Trainer against server", unit="mean |difference of log-probs|", metric="log_prob_mismatch/mean")


def draw(plan: Plan, set_name: str, results: Sequence[VariantResult], picture: Path) -> None:
    """Draws the finished runs of a set over the steps: means over seeds, bands of one standard deviation.

    The suffix of `picture` picks its format.
    """
    score = Panel(title="Held-out score", unit=plan.score.rpartition("/")[2], metric=plan.score)
    panels = (score, PANELS["R"], LENGTH, PANELS["E"], PANELS["X"], MISMATCH)
    figure = Figure(figsize=(13, 6.8), dpi=80, layout="constrained")
    figure.suptitle(SETS[set_name].question, fontsize=12)
    axes = list(figure.subplots(2, 3).flat)
    for panel_axes, panel in zip(axes, panels, strict=True):
        style_axes(panel_axes, panel)
    for i, result in enumerate(results):
        seeds = {run.seed for run in result.runs}
        runs = [read_metrics(run.metrics_path) for run in plan.of(result.run_name) if run.seed in seeds]
        label = f"{result.variant} ({len(runs)} seeds)" if len(runs) > 1 else result.variant
        for panel_axes, panel in zip(axes, panels, strict=True):
            draw_panel(panel_axes, runs, panel, color=COLORS[i % len(COLORS)], label=label)
    for panel_axes, panel in zip(axes, panels, strict=True):
        if panel.lowest is not None and panel_axes.get_ylim()[0] < panel.lowest:
            panel_axes.set_ylim(bottom=panel.lowest)
    axes[0].legend(loc="best", frameon=False, fontsize=9)
    figure.savefig(picture)
