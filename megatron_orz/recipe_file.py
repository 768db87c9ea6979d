"""Recipes as files: what a tool that starts them has to know of one."""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Sequence
from pathlib import Path

from megatron_orz.command_line import parse
from megatron_orz.config import Config


def read_recipe(recipe: Path, options: Sequence[str] = ()) -> Config:
    """The config of a recipe with these command line options. Raises ValueError for what is not a recipe."""
    if not recipe.is_file():
        known = ", ".join(sorted(str(path) for path in recipe.parent.glob("*.py"))) if recipe.parent.is_dir() else ""
        raise ValueError(f"there is no recipe {recipe}; " + (f"there are {known}" if known else "name its file"))
    config = runpy.run_path(str(recipe)).get("RECIPE")
    if not isinstance(config, Config):
        raise ValueError(f"{recipe} is no recipe; set RECIPE in it to a Config, as examples/demo.py does")
    if not options:
        return config
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(config, options)
    except SystemExit as error:
        words = " ".join(options)
        raise ValueError(f"{recipe} does not take {words}; correct it:\n{said.getvalue().strip()}") from error
