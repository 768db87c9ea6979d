"""Jobs on a real local Ray of two raylets, which stand for two machines: finished, and started again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.logs import read_metrics
from tests.faults.tiny_run import NUM_STEPS, write_recipe

ray = pytest.importorskip("ray", reason="Ray is not installed (megatron_orz[ray])")

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1200
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]

TOLD_ONCE = """
def tell():
    while not (Path("run/metrics.jsonl").exists() and Path("run/metrics.jsonl").stat().st_size):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGUSR1)

import os, signal, sys, threading, time
if __name__ == "__main__" and "--dry-run" not in sys.argv and not Path("told").exists():
    Path("told").touch()
    threading.Thread(target=tell, daemon=True).start()

"""
"""The first start gets, from within, the signal that a scheduler sends."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        cluster.wait_for_nodes(timeout=120)
        yield cluster.address
    finally:
        cluster.shutdown()


def launch(home: Path, address: str, *options: str, recipe: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/launch.py"), "recipe.py", "--ray", "--ray-address", address]
    common = ["--gpus-per-node", "0", "--min-free-gib", "0.1", "--interface", "lo", "--max-skew-s", "60"]
    return subprocess.run(
        [*command, *common, *options, "--", *recipe], cwd=home, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_two_machines_train_together(address: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    done = launch(tmp_path, address, "--nodes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 nodes are here" in done.stdout + done.stderr
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == NUM_STEPS + 1


def test_a_run_that_was_stopped_is_started_again_and_goes_on(address: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    main = 'if __name__ == "__main__":\n'
    recipe.write_text(recipe.read_text().replace(main, TOLD_ONCE + main))
    done = launch(tmp_path, address, recipe=("--ppo.num-steps", "30"))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "ended with 75; starting again" in said
    assert "going on from the checkpoint after" in said
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 31


def test_a_cluster_that_is_too_small_is_refused_at_once(address: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    done = launch(tmp_path, address, "--nodes", "3")
    assert done.returncode == 2
    assert "the job needs 3 machines with 1 CPUs, and 2 of the cluster's 2 have them" in done.stderr
    assert not (tmp_path / "run").exists()
