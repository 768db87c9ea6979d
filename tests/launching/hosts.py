"""Several hosts on one machine: network namespaces with process tables of their own, and a job's agents on them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megatron_orz.config import Config
from megatron_orz.launch.job import AGENT, Nodes, Role
from megatron_orz.recipe_file import read_recipe
from megatron_orz.rollout.token import TOKEN_VARIABLE

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1200
BRIDGE = f"orz{os.getpid() % 10000}"


def why_not() -> str:
    """Why there can be no network namespaces here; empty when there can."""
    if shutil.which("ip") is None:
        return "there is no ip (apt-get install iproute2)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "true"], capture_output=True, timeout=60)
    return "" if probe.returncode == 0 else "this user may make no network namespace"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=60, capture_output=True)


def link(host: int) -> str:
    """The end of a host's cable that lies in the bridge."""
    return f"{BRIDGE}v{host}"


@contextmanager
def open_hosts(num_hosts: int) -> Iterator[list[str]]:
    """Namespaces with 10.77.0.1, 10.77.0.2 and so on, on `eth0`, joined by a bridge; their names."""
    names = [f"{BRIDGE}-{host}" for host in range(num_hosts)]
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for host, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", link(host), "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", link(host), "master", BRIDGE)
            ip("link", "set", link(host), "up")
            for words in (["addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                ip("-n", name, *words)
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for host, name in enumerate(names):
            subprocess.run(["ip", "link", "del", link(host)], timeout=60, capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], timeout=60, capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], timeout=60, capture_output=True, check=False)


class Job:
    """An agent on every host, each with a name and a process table of its own, as on another machine.

    home: holds `recipe.py`, whose options are `recipe`. The last of the hosts run servers, if `server_nodes` says so.
    """

    def __init__(self, home: Path, hosts: list[str], *recipe: str, server_nodes: int = 0) -> None:
        self.home = home
        self.hosts = hosts
        nodes = Nodes(
            nodes=len(hosts),
            server_nodes=server_nodes,
            gpus_per_node=0,
            interface="eth0",
            min_free_gib=0.1,
            start_timeout_s=300,
            max_skew_s=60,
        )
        config = self._config(*recipe)
        nodes.check(config)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ORZ_ATTEMPT": "netns.0",
            TOKEN_VARIABLE: "a-token",
        }
        self.agents: list[subprocess.Popen[bytes]] = []
        for host, name in enumerate(hosts):
            is_trainer = host < nodes.trainer_nodes
            role: Role = "trainer" if is_trainer else "servers"
            words = nodes.agent_arguments(role, Path("recipe.py"), recipe, config)
            self._start(host, name, words, node_rank=host if is_trainer else host - nodes.trainer_nodes)

    def _start(self, host: int, name: str, words: list[str], *, node_rank: int) -> None:
        namespaces = ["ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--kill-child"]
        script = 'hostname "$1"; mount -t proc proc /proc; shift; exec "$@"'
        command = [*namespaces, "--mount", "bash", "-c", script, "bash", name, sys.executable, "-m", AGENT, *words]
        with self.log(host).open("wb") as log:
            self.agents.append(
                subprocess.Popen(
                    command,
                    cwd=self.home,
                    env={**self._environment, "ORZ_NODE_RANK": str(node_rank)},
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

    def wait_until(self, condition: Callable[[], Any], *, timeout_s: float = TIMEOUT_S) -> None:
        """Raises AssertionError, with all that was said, at the deadline or when an agent ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert all(agent.poll() is None for agent in self.agents), self.said()
            time.sleep(0.2)

    def said(self) -> str:
        paths = [*sorted(self.home.glob("*.log")), *sorted((self.home / "run.launch").rglob("*.log"))]
        paths += sorted((self.home / "run").glob("*.log"))
        return "\n".join(f"== {path}\n{path.read_text()[-4000:]}" for path in paths)

    def num_rows(self) -> int:
        metrics = self.home / "run/metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def processes(self, host: int, *words: str) -> list[psutil.Process]:
        """Of a host, those whose command line holds all these words."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.hosts[host]], capture_output=True, text=True, timeout=60, check=True
        )
        found = []
        for pid in map(int, done.stdout.split()):
            try:
                process = psutil.Process(pid)
                if set(words) <= set(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def tell_agent(self, host: int, number: signal.Signals) -> None:
        """Sends a signal to the agent itself, which is the first process of its host."""
        (agent,) = psutil.Process(self.agents[host].pid).children()
        agent.send_signal(number)

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait(60)
