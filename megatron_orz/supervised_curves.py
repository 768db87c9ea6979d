"""The curves of a supervised run, drawn into a picture from its metrics file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from megatron_orz.curves import COLORS, Panel, draw_panel, mean_over_runs, style_axes, write_picture
from megatron_orz.logs import read_metrics

PANELS = {
    "L": Panel(title="Loss", unit="nats per learnt token", metric="supervised/loss"),
    "R": Panel(title="Learning rate", unit="of AdamW", metric="policy/lr"),
    "G": Panel(title="Gradient norm", unit="before clipping", metric="policy/grad_norm"),
}
LAYOUT = "LLRG"


def draw_supervised_curves(metrics_path: Path, picture: Path) -> None:
    """Draws the loss with the held-out losses (`evaluation/<file>/loss`) as points, the rate and the gradient norm."""
    run = read_metrics(metrics_path)
    figure = Figure(figsize=(13, 3.6), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic(LAYOUT)
    for letter, panel in PANELS.items():
        style_axes(axes[letter], panel)
        draw_panel(axes[letter], [run], panel, color=COLORS[0], label="training")
    names = sorted({name for row in run for name in row if name.startswith("evaluation/")})
    for name, color in zip(names, COLORS[1:], strict=False):
        steps, losses, _ = mean_over_runs([run], name)
        label = f"{name.split('/')[1]}, held out"
        axes["L"].plot(steps, losses, "o-", color=color, markerfacecolor="white", linewidth=1, label=label)
    axes["L"].legend(loc="best", frameon=False, fontsize=9)
    write_picture(figure, picture)
