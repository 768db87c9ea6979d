"""compute-sanitizer watches every CUDA kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("launch_every_kernel.py")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or sanitizer is None:
        pytest.skip("no CUDA device" if sanitizer else "no compute-sanitizer on PATH")
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, str(SCRIPT)],
        # Each tensor is an allocation of its own, so that an access past its end is one outside memory.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = "0 hazards displayed" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert summary in result.stdout
