"""Draws the kernels under the roofline of the machine they were measured on.

python tools/roofline.py bench/results/amd-epyc-2-threads-kernels.json
python tools/roofline.py bench/results/amd-epyc-2-threads-kernels.json --output docs/kernels_roofline.png
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from megatron_orz.command_line import plain_errors, read_command

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MARKERS = ("o", "s", "^", "v", "D", "P", "X")


@dataclass(frozen=True)
class Arguments:
    """Draws a roofline from the figures of tools/benchmark.py kernels."""

    results: tyro.conf.Positional[Path]
    """File of figures that holds both matrix products and a copy of the hidden states: the two floors."""
    output: Path | None = None
    """Where to draw, as .png, .svg or .pdf; by default beside the figures."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a task has to do: its arithmetic, and every input read and output written once."""

    task: str
    flops: float
    num_bytes: float
    seconds: dict[str, float]
    """Best time of each implementation."""

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.num_bytes


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What the machine reached in the same run, in FLOP/s and byte/s, and the tasks."""

    device: str
    peak_flops: float
    bandwidth: float
    works: tuple[Work, ...]

    def roof(self, intensity: float) -> float:
        """FLOP/s that nothing of this intensity exceeds."""
        return min(self.peak_flops, intensity * self.bandwidth)


def read_roofline(path: Path) -> Roofline:
    """Raises ValueError for a file that is none of figures, or lacks a floor."""
    try:
        content = json.loads(path.read_text())
        groups = [group for group in content["groups"] if re.search(r"T=\d+ H=\d+", group["shape"])]
        rates = [rate for group in groups for rate in _floor_rates(group)]
        works = tuple(_work(group) for group in groups)
        device = content["environment"]["device"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no figures of kernels ({error}); run tools/benchmark.py kernels") from error
    peaks, bandwidths = ([value for kind, value in rates if kind == wanted] for wanted in ("flops", "bytes"))
    if not (peaks and bandwidths):
        raise ValueError(f"{path} lacks a floor; measure token-loss and value-loss with tools/benchmark.py kernels")
    return Roofline(device=device, peak_flops=max(peaks), bandwidth=max(bandwidths), works=works)


def _sizes(group: dict[str, Any]) -> tuple[int, int, int, int]:
    """T, H, V (0 for a task without a vocabulary) and bytes of an element."""
    sizes = {letter: int(size) for letter, size in re.findall(r"\b([THV])=(\d+)", group["shape"])}
    return sizes["T"], sizes["H"], sizes.get("V", 0), ELEMENT_BYTES[group["shape"].rsplit(", ", 1)[1]]


def _floor_rates(group: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The rate at which the machine did what the task cannot avoid: matrix products, or one copy."""
    t, h, v, element_bytes = _sizes(group)
    products = sum(count for name, count in group["floor"].items() if name.startswith("matmul"))
    if products:
        yield "flops", 2.0 * t * h * v * products / group["floor_s"]
    elif group["floor"]:
        yield "bytes", 2.0 * t * h * element_bytes / group["floor_s"]


def _work(group: dict[str, Any]) -> Work:
    """Heads: 2 T H V for each product, the inputs read and their gradients written. Values: 6 T H, likewise."""
    t, h, v, element_bytes = _sizes(group)
    products = sum(count for name, count in group["floor"].items() if name.startswith("matmul"))
    is_gradient = products != 1
    return Work(
        task=group["task"],
        flops=2.0 * t * h * v * products if v else 6.0 * t * h,
        num_bytes=(t * h + v * h) * element_bytes * (2 if is_gradient else 1),
        seconds={name: row["min_s"] for name, row in group["rows"].items() if row["min_s"]},
    )


def draw(roofline: Roofline, picture: Path) -> None:
    """Both roofs, and a point for each implementation of each task."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    low = min(work.intensity for work in roofline.works) / 4
    high = max(work.intensity for work in roofline.works) * 4
    ridge = roofline.peak_flops / roofline.bandwidth
    xs = [low, ridge, high]
    axes.plot(xs, [roofline.roof(x) / 1e9 for x in xs], color="black", label="measured floors")
    names = sorted({name for work in roofline.works for name in work.seconds})
    for name, marker in zip(names, cycle(MARKERS), strict=False):
        points = [
            (work.intensity, work.flops / work.seconds[name] / 1e9) for work in roofline.works if name in work.seconds
        ]
        ours = name == "megatron_orz"
        axes.plot(*zip(*points, strict=True), marker, label=name, markersize=9 if ours else 6, zorder=3 if ours else 2)
    for work in roofline.works:
        place: dict[str, Any] = {
            "xycoords": ("data", "axes fraction"),
            "ha": "right",
            "va": "bottom",
            "rotation": 90,
            "fontsize": 8,
        }
        axes.annotate(work.task, (work.intensity * 0.95, 0.05), **place)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that has to be moved", ylabel="GFLOP/s")
    axes.set_title(roofline.device, fontsize=10)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower center")
    figure.savefig(picture, dpi=110, metadata={"Software": None} if picture.suffix == ".png" else None)


def main() -> None:
    with plain_errors():
        arguments = read_command(Arguments)
        output = arguments.output or arguments.results.with_suffix(".png")
        draw(read_roofline(arguments.results), output)
        print(output)


if __name__ == "__main__":
    main()
