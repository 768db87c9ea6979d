"""Draws when trainer and servers worked, from the timeline of a run.

python tools/timeline.py runs/demo
python tools/timeline.py runs/demo --output overlap.png
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_orz.command_line import plain_errors, read_command
from megatron_orz.timeline import TIMELINE_FILE, draw_timeline


@dataclass(frozen=True)
class Arguments:
    """Draws the timeline of a run, which chrome://tracing and Perfetto open as it is."""

    run_dir: tyro.conf.Positional[Path]
    """Directory of the run."""
    output: Path | None = None
    """Where to draw; by default timeline.png in the run's directory."""


def main() -> None:
    with plain_errors():
        arguments = read_command(Arguments)
        output = arguments.output or arguments.run_dir / "timeline.png"
        draw_timeline(arguments.run_dir / TIMELINE_FILE, output)
        print(output)


if __name__ == "__main__":
    main()
