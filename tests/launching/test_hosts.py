"""Several hosts as network namespaces: the ranks meet across them, and a host that disappears ends the run in time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.config import Config
from megatron_orz.launch.job import AGENT, Nodes
from megatron_orz.logs import read_metrics
from megatron_orz.recipe_file import read_recipe
from tests.faults.tiny_run import NUM_STEPS, write_recipe

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1200
BRIDGE = f"orz{os.getpid() % 10000}"


def why_not() -> str:
    """Why there can be no network namespaces here; empty when there can."""
    if shutil.which("ip") is None:
        return "there is no ip (apt-get install iproute2)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "true"], capture_output=True, timeout=60)
    return "" if probe.returncode == 0 else "this user may make no network namespace"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are namespaces"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=60, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with 10.77.0.1 and 10.77.0.2 on `eth0`, joined by a bridge; their names."""
    names = [f"{BRIDGE}-{host}" for host in range(2)]
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for host, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"{BRIDGE}v{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{BRIDGE}v{host}", "master", BRIDGE)
            ip("link", "set", f"{BRIDGE}v{host}", "up")
            for words in (["addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                ip("-n", name, *words)
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for host, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"{BRIDGE}v{host}"], timeout=60, capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], timeout=60, capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], timeout=60, capture_output=True, check=False)


class Job:
    """An agent on every host, each with a name and a process table of its own, as on another machine."""

    def __init__(self, home: Path, hosts: list[str], *recipe: str, interface: str = "eth0") -> None:
        write_recipe(home)
        self.home = home
        nodes = Nodes(
            nodes=2,
            gpus_per_node=0,
            interface=interface,
            min_free_gib=0.1,
            start_timeout_s=300,
            max_skew_s=60,
        )
        config = self._config(*recipe)
        words = nodes.agent_arguments("trainer", Path("recipe.py"), recipe, config)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ORZ_ATTEMPT": "netns.0"}
        self.agents = []
        for host, name in enumerate(hosts):
            namespaces = ["ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--kill-child"]
            script = 'hostname "$1"; mount -t proc proc /proc; shift; exec "$@"'
            command = [*namespaces, "--mount", "bash", "-c", script, "bash", name, sys.executable, "-m", AGENT, *words]
            with self.log(host).open("wb") as log:
                self.agents.append(
                    subprocess.Popen(
                        command,
                        cwd=home,
                        env={**environment, "ORZ_NODE_RANK": str(host)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    def _config(self, *recipe: str) -> Config:
        before = Path.cwd()
        os.chdir(self.home)
        try:
            return read_recipe(Path("recipe.py"), recipe)
        finally:
            os.chdir(before)

    def log(self, host: int) -> Path:
        return self.home / f"agent-{host}.log"

    def wait(self, host: int, *, timeout_s: float = TIMEOUT_S) -> int:
        return self.agents[host].wait(timeout_s)

    def said(self) -> str:
        paths = [*sorted(self.home.glob("*.log")), *sorted((self.home / "run.launch").rglob("*.log"))]
        return "\n".join(f"== {path}\n{path.read_text()[-4000:]}" for path in paths)

    def num_rows(self) -> int:
        metrics = self.home / "run/metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait(60)


def test_ranks_meet_across_hosts(tmp_path: Path, hosts: list[str]) -> None:
    job = Job(tmp_path, hosts)
    try:
        assert [job.wait(host) for host in range(2)] == [0, 0], job.said()
    finally:
        job.close()
    assert f"2 nodes are here: {hosts[0]}, {hosts[1]}" in job.said()
    assert "all-reduce of 2 ranks by gloo is right" in job.said()
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == NUM_STEPS + 1


def test_a_host_that_disappears_ends_the_run_within_its_deadlines(tmp_path: Path, hosts: list[str]) -> None:
    deadline_s = 30
    job = Job(tmp_path, hosts, "--ppo.num-steps", "100000", "--parallel.timeout-s", str(deadline_s))
    try:
        started = time.monotonic()
        while job.num_rows() < 2:
            assert time.monotonic() - started < TIMEOUT_S, job.said()
            assert job.agents[0].poll() is None, job.said()
            time.sleep(0.2)
        ip("link", "set", f"{BRIDGE}v1", "down")
        lost = time.monotonic()
        codes = [job.wait(host) for host in range(2)]
        # The collective's deadline, the store's 30 s, the watchdog's and the agent's graces; the machine may be busy.
        assert time.monotonic() - lost < deadline_s + 30 + 10 + 60 + 120, job.said()
    finally:
        job.close()
    assert all(code not in (0, 75) for code in codes), codes
    said = job.said()
    # Whose collective ran into its deadline first says so, and the other node is told by its notice.
    assert "Timed out waiting 30000ms" in said
    assert any(f"on node {host}; the ranks of this node are ended" in said for host in hosts), said
    for host in hosts:
        left = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, timeout=60)
        assert left.stdout == "", said


def test_a_host_without_the_interface_ends_the_job_on_all_hosts_at_once(tmp_path: Path, hosts: list[str]) -> None:
    ip("-n", hosts[1], "link", "set", "eth0", "name", "eth7")
    job = Job(tmp_path, hosts)
    try:
        started = time.monotonic()
        codes = [job.wait(host, timeout_s=200) for host in range(2)]
        assert time.monotonic() - started < 200
    finally:
        job.close()
    assert codes == [2, 2]
    for host in range(2):
        assert f"node {hosts[1]} has no interface eth0" in job.log(host).read_text()
