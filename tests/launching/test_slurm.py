"""Jobs on a real SLURM of this machine: finished, stopped by the signal and requeued, with servers on other nodes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.logs import read_metrics
from tests.faults.tiny_run import NUM_STEPS, write_recipe
from tests.launching.slurm_cluster import SlurmCluster, why_not

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1500
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is a SLURM"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), num_nodes=2) as cluster:
        yield cluster


def submit(cluster: SlurmCluster, home: Path, *options: str, recipe: tuple[str, ...] = ()) -> str:
    """Submits through the tool, on nodes without GPUs, and returns the job's id."""
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools/launch.py"), "recipe.py", "--slurm", "--gpus-per-node", "0"]
    common = ["--venv", str(Path(sys.prefix)), "--min-free-gib", "0.1", "--interface", "lo", "--max-skew-s", "60"]
    done = subprocess.run(
        [*command, *common, *options, "--", *recipe],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def logs(home: Path) -> str:
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(home.rglob("*.log")))


def rewards(run_dir: Path) -> list[tuple[float, ...]]:
    """What a run computed, without what it took."""
    names = ("reward/mean", "policy/loss", "policy/grad_norm", "critic/loss")
    return [tuple(row[name] for name in names if name in row) for row in read_metrics(run_dir / "metrics.jsonl")]


def test_a_job_stopped_by_the_signal_is_requeued_and_ends_as_one_that_was_not(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    write_recipe(tmp_path)
    steps = ("--ppo.num-steps", "12")
    whole = submit(cluster, tmp_path, recipe=(*steps, "--run-dir", "whole"))
    cluster.wait_for(whole, "COMPLETED", timeout_s=TIMEOUT_S)
    job = submit(cluster, tmp_path, recipe=steps)
    cluster.wait_for(job, "RUNNING", timeout_s=TIMEOUT_S)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.2)
    # What SLURM sends to the batch script before the time limit.
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING", timeout_s=TIMEOUT_S)
    rows = metrics.read_text().count("\n")
    assert rows < 12, "the signal came too late"
    done = cluster.wait_for(job, "COMPLETED", timeout_s=TIMEOUT_S)
    assert done["Restarts"] == "1"
    assert done["ExitCode"] == "0:0"
    said = logs(tmp_path)
    assert "the trainer ended with 75; the job is requeued" in said
    assert "going on from the checkpoint after" in said
    assert rewards(tmp_path / "run") == rewards(tmp_path / "whole")


def test_two_nodes_train_together(cluster: SlurmCluster, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    job = submit(cluster, tmp_path, "--nodes", "2")
    done = cluster.wait_for(job, "COMPLETED", "FAILED", timeout_s=TIMEOUT_S)
    said = logs(tmp_path)
    assert done["ExitCode"] == "0:0", said
    assert "2 nodes are here: node0, node1" in said
    assert "all-reduce of 2 ranks by gloo is right" in said
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == NUM_STEPS + 1


def test_servers_on_nodes_of_another_partition_are_found_and_ended(cluster: SlurmCluster, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    write_recipe(tmp_path, family="qwen3")
    options = ("--nodes", "2", "--server-nodes", "1", "--partition", "main", "--server-partition", "second")
    recipe = ("--fleet.kind", "vllm", "--fleet.start-timeout-s", "900", "--ppo.num-steps", "2", "--sampling.stop", "a")
    job = submit(cluster, tmp_path, *options, recipe=recipe)
    done = cluster.wait_for(job, "COMPLETED", "FAILED", timeout_s=TIMEOUT_S)
    said = logs(tmp_path)
    assert done["ExitCode"] == "0:0", said
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 3
    assert list(tmp_path.rglob("server-0-node1.log")), "the server wrote no log of its own"
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert left.stdout == ""
