"""What a launcher has to know of a recipe before it starts it."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_orz.command_line import parse
from megatron_orz.config import Config

_DRY_RUN_TIMEOUT_S = 600


def read_recipe(recipe: Path, arguments: Sequence[str]) -> Config:
    """The config of a recipe with these command line options. Raises ValueError for what is not a recipe."""
    if not recipe.is_file():
        known = ", ".join(sorted(str(path) for path in recipe.parent.glob("*.py"))) if recipe.parent.is_dir() else ""
        raise ValueError(f"there is no recipe {recipe}" + (f"; there are {known}" if known else ""))
    config = runpy.run_path(str(recipe)).get("RECIPE")
    if not isinstance(config, Config):
        raise ValueError(f"{recipe} is no recipe; set RECIPE in it to a Config, as examples/demo.py does")
    if not arguments:
        return config
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(config, arguments)
    except SystemExit as error:
        words = " ".join(arguments)
        raise ValueError(f"{recipe} does not take {words}; correct it:\n{said.getvalue().strip()}") from error


def check_whole(recipe: Path, arguments: Sequence[str], *, num_ranks: int) -> None:
    """Has the recipe check itself for this many ranks: layout, models, tokenizers and data (`--dry-run`).

    Raises ValueError with what it finds.
    """
    environment = {**os.environ, "WORLD_SIZE": str(num_ranks), "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, str(recipe), *arguments, "--dry-run"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_DRY_RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{recipe} --dry-run did not end within {_DRY_RUN_TIMEOUT_S} s; run it by hand") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        reason = errors[-1].removeprefix("error: ") if errors else done.stderr.strip()[-2000:]
        raise ValueError(f"{recipe} refuses to start; correct this: {reason}")
