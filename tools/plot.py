"""Draws the training curves of runs.

python tools/plot.py runs/demo
python tools/plot.py runs/first runs/second --output both.png
python tools/plot.py runs/grpo-seed0 runs/grpo-seed1 runs/ppo-seed0 runs/ppo-seed1 --output mean_and_band.svg
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_orz.command_line import plain_errors, read_command
from megatron_orz.curves import draw_curves
from megatron_orz.logs import METRICS_FILE


@dataclass(frozen=True)
class Arguments:
    """Draws the training curves of one or more runs into one picture; seeds of one run as their mean and a band."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of the runs. Those named alike but for a seed at the end (-seed0, /seed0) are drawn as one."""
    output: Path | None = None
    """Where to draw, as .png, .svg or .pdf; by default curves.png in the first run's directory."""


def main() -> None:
    with plain_errors():
        arguments = read_command(Arguments)
        metrics_paths = [run_dir / METRICS_FILE for run_dir in arguments.run_dirs]
        if not metrics_paths:
            raise ValueError("no run directory is named; give at least one")
        for path in metrics_paths:
            if not path.exists():
                raise ValueError(f"{path} does not exist; give directories of runs that have finished a step")
        output = arguments.output or arguments.run_dirs[0] / "curves.png"
        draw_curves(metrics_paths, output)
        print(output)


if __name__ == "__main__":
    main()
