"""A run whose vLLM server is killed, started again, is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_orz.checkpoint.manifest import Manifest
from tests.faults.tiny_run import write_recipe

pytest.importorskip("vllm")

DEADLINE_S = 500
NUM_STEPS = 6


def start(recipe: Path) -> subprocess.Popen[str]:
    arguments = ["--fleet.kind", "vllm", "--checkpoint.interval", "1", "--ppo.num-steps", str(NUM_STEPS)]
    return subprocess.Popen(
        [sys.executable, str(recipe), *arguments],
        cwd=recipe.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(run: subprocess.Popen[str], file: Path, num_rows: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not file.exists() or file.read_bytes().count(b"\n") < num_rows:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(3 * DEADLINE_S)
def test_a_run_goes_on_after_its_server_was_killed(tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path, family="qwen3"), tmp_path / "run"
    run = start(recipe)
    try:
        wait_for_rows(run, run_dir / "metrics.jsonl", 3)
        servers = [child for child in psutil.Process(run.pid).children(recursive=True) if "VLLM" in child.name()]
        assert servers
        for server in servers:
            server.kill()
        said = run.communicate(timeout=60)[1]
        assert run.returncode == 2, said
        assert "server" in said
        latest = max((run_dir / "checkpoints").glob("step-*"))
    finally:
        run.kill()
        run.wait()
    kept = (run_dir / "metrics.jsonl").read_bytes()[: Manifest.read(latest).progress.metrics_bytes]

    run = start(recipe)
    said = run.communicate(timeout=DEADLINE_S)[1]
    assert run.returncode == 0, said
    rows = (run_dir / "metrics.jsonl").read_bytes()
    assert rows.startswith(kept), "rows of finished steps are as they were"
    assert [json.loads(line)["step"] for line in rows.splitlines()] == list(range(NUM_STEPS + 1))
    manifest = Manifest.read((run_dir / "checkpoints" / "latest").resolve())
    assert (manifest.progress.step, manifest.progress.prompt_cursor) == (NUM_STEPS, 3 * NUM_STEPS)
