"""Files of figures: where they go and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_orz.benchmark import environment

FOLDER = Path("bench", "results")


def write(path: Path | None, subject: str, results: Mapping[str, Any], device: torch.device, console: Console) -> Path:
    """Writes JSON, by default to bench/results/<device>-<subject>.json, and says where."""
    path = path or FOLDER / f"{environment.slug(environment.device_name(device))}-{subject}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=str) + "\n")
    console.print(f"{path} has the figures")
    return path
