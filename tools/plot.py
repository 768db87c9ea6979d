"""Draws the training curves of runs.

python tools/plot.py runs/demo
python tools/plot.py runs/first runs/second --output both.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_orz.curves import draw_curves
from megatron_orz.logs import METRICS_FILE


@dataclass(frozen=True)
class Arguments:
    """Draws the training curves of one or more runs into one picture."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of the runs."""
    output: Path | None = None
    """Where to draw; by default curves.png in the first run's directory."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    metrics_paths = [run_dir / METRICS_FILE for run_dir in arguments.run_dirs]
    if not metrics_paths:
        sys.exit("name at least one run directory")
    for path in metrics_paths:
        if not path.exists():
            sys.exit(f"{path} does not exist; give directories of runs that have finished a step")
    output = arguments.output or arguments.run_dirs[0] / "curves.png"
    draw_curves(metrics_paths, output)
    print(output)


if __name__ == "__main__":
    main()
