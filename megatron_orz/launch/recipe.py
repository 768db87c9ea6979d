"""Whether a recipe would start: found out before anything of its job does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DRY_RUN_TIMEOUT_S = 600


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
