"""Files of figures: where they go, how they are written, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_orz.benchmark import environment
from megatron_orz.benchmark.group import OURS
from megatron_orz.whole_file import whole_file

FOLDER = Path("bench", "results")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One implementation of a task, as a file has it."""

    task: str
    shape: str
    name: str
    times_s: Sequence[float]
    figures: Mapping[str, Any]
    """All else that was found."""
    targets: Sequence[Mapping[str, Any]]
    """Of its group."""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def write(path: Path | None, subject: str, results: Mapping[str, Any], device: torch.device, console: Console) -> Path:
    """Writes JSON, by default to bench/results/<device>-<subject>.json, and says where."""
    path = path or FOLDER / f"{environment.slug(environment.device_name(device))}-{subject}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(results, indent=1, default=str).encode() + b"\n")
    console.print(f"{path} has the figures")
    return path


def read(path: Path) -> dict[str, Any]:
    """A file of figures. Raises ValueError for what is none."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as figures of a benchmark ({error}); measure again") from error
    if not isinstance(results, dict) or not isinstance(results.get("environment"), dict):
        raise ValueError(f"{path} has no environment: tools/benchmark.py did not write it; name one of its files")
    return results


def measured(results: Mapping[str, Any]) -> Iterator[Measured]:
    """Every implementation that was timed."""
    for group in results.get("groups", ()):
        for name, row in group["rows"].items():
            if row["times_s"]:
                yield Measured(
                    task=group["task"],
                    shape=group["shape"],
                    name=name,
                    times_s=row["times_s"],
                    figures=row,
                    targets=group["targets"],
                )
    for model in results.get("models", ()):  # of the weight exchange, whose rows are transports and plain copies
        for name, times_s in model["times_s"].items():
            is_transport = name.removesuffix(", delta") in ("ipc", "nccl", "gloo", "disk")
            yield Measured(
                task="sync",
                shape=f"{model['model']}, {model['num_bytes'] / 1e9:.2f} GB",
                name=f"{OURS}, {name}" if is_transport else name,
                times_s=times_s,
                figures={},
                targets=(),
            )
