"""Calls in processes of their own: what comes back, and that nothing of them stays."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_orz.benchmark.own_process import call_in_process

ENDLESS = """
import time
from megatron_orz.benchmark.own_process import call_in_process
if __name__ == "__main__":
    call_in_process(time.sleep, 600, timeout_s=600)
"""


def descendants(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def test_a_call_returns_and_raises_what_its_function_does() -> None:
    assert call_in_process(os.getpid, timeout_s=120) != os.getpid()
    with pytest.raises(ValueError, match="math domain error"):
        call_in_process(math.sqrt, -1.0, timeout_s=120)


def test_a_call_past_its_deadline_is_ended() -> None:
    before = {process.pid for process in descendants(psutil.Process())}
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        call_in_process(time.sleep, 600, timeout_s=3)
    assert time.monotonic() - start < 120
    of_calls = [process for process in descendants(psutil.Process()) if process.pid not in before]
    assert [process for process in of_calls if "spawn_main" in " ".join(process.cmdline())] == []


def test_a_call_ends_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "endless.py"
    program.write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    caller = subprocess.Popen([sys.executable, program], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (calls := [p for p in descendants(psutil.Process(caller.pid)) if "spawn_main" in str(p.cmdline())]):
            assert caller.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait(60)
    _, alive = psutil.wait_procs(calls, timeout=60)
    assert alive == []
