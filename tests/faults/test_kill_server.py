"""A run whose vLLM server is killed goes on; one that is killed as a whole is complete when started again."""

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
MAX_MISMATCH = 1e-3


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
def test_a_run_outlives_its_server_and_is_started_again_with_a_new_one(tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path, family="qwen3"), tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    run = start(recipe)
    try:
        wait_for_rows(run, metrics, 3)
        engines = [child for child in psutil.Process(run.pid).children(recursive=True) if "VLLM" in child.name()]
        assert engines
        for engine in engines:
            engine.kill()
        wait_for_rows(run, metrics, 5)
        assert max(row["fleet/restarts"] for row in rows_of(metrics)) == 1
        for process in [*psutil.Process(run.pid).children(recursive=True), run]:
            process.kill()
        run.wait()
    finally:
        run.kill()
        run.wait()
    latest = (run_dir / "checkpoints" / "latest").resolve()
    kept = metrics.read_bytes()[: Manifest.read(latest).progress.metrics_bytes]

    run = start(recipe)
    said = run.communicate(timeout=DEADLINE_S)[1]
    assert run.returncode == 0, said
    assert metrics.read_bytes().startswith(kept), "rows of finished steps are as they were"
    rows = rows_of(metrics)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert max(row["log_prob_mismatch/mean"] for row in rows[:-1]) < MAX_MISMATCH, "every server got the weights"
    manifest = Manifest.read((run_dir / "checkpoints" / "latest").resolve())
    assert (manifest.progress.step, manifest.progress.prompt_cursor) == (NUM_STEPS, 3 * NUM_STEPS)


def rows_of(metrics: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in metrics.read_bytes().splitlines()]
