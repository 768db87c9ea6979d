"""Servers on hosts of their own network namespaces, found, watched, started anew and lost; vLLM on the CPU."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.launch.lifeline import LOST_S
from megatron_orz.launch.processes import END_S
from megatron_orz.logs import read_metrics
from megatron_orz.rollout.replica import _RESTART_DELAYS_S
from tests.faults.tiny_run import write_recipe
from tests.launching.hosts import TIMEOUT_S, Job, ip, link, open_hosts, why_not

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are namespaces"),
]

VLLM = ("--fleet.kind", "vllm", "--fleet.start-timeout-s", "900", "--sampling.stop", "a")
ENDLESS = ("--ppo.num-steps", "100000")
SERVER = "vllm.entrypoints.openai.api_server"
ADDRESSES = ("127.0.0.1", "10.77.0.2")
"""Where servers listen: those beside rank 0 answer nobody else."""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with open_hosts(2) as names:
        yield names


def rows(job: Job) -> list[dict[str, float]]:
    return read_metrics(job.home / "run/metrics.jsonl") if job.num_rows() else []


def test_a_colocated_fleet_lives_on_both_hosts_and_each_restarts_its_own(tmp_path: Path, hosts: list[str]) -> None:
    write_recipe(tmp_path, family="qwen3")
    job = Job(tmp_path, hosts, *VLLM, *ENDLESS, "--fleet.colocated", "--fleet.num-servers", "2")
    try:
        job.wait_until(lambda: job.num_rows() >= 2)
        supervised = [job.processes(host, SERVER, "--host", address) for host, address in enumerate(ADDRESSES)]
        assert all(supervised), job.said()
        assert rows(job)[-1]["fleet/servers_up"] == 2
        for process in supervised[1]:
            if process.cmdline()[1:3] == ["-m", SERVER]:  # and not its supervisor
                process.kill()
        job.wait_until(lambda: rows(job)[-1]["fleet/restarts"] >= 1)
        job.wait_until(lambda: rows(job)[-1]["fleet/servers_up"] == 2)
        (tmp_path / "run/vllm-1-restart-1.log").read_text()
        seen = job.num_rows()
        job.wait_until(lambda: job.num_rows() >= seen + 2)
        for host in range(2):
            job.tell_agent(host, signal.SIGTERM)
        assert [job.wait(host) for host in range(2)] == [75, 75], job.said()
        assert job.processes(0) + job.processes(1) == [], job.said()
    finally:
        job.close()


def test_a_host_that_disappears_with_its_share_of_the_fleet_ends_the_run(tmp_path: Path, hosts: list[str]) -> None:
    write_recipe(tmp_path, family="qwen3")
    job = Job(tmp_path, hosts, *VLLM, *ENDLESS, "--fleet.colocated", "--fleet.num-servers", "2")
    try:
        job.wait_until(lambda: job.num_rows() >= 1)
        ip("link", "set", link(1), "down")
        lost = time.monotonic()
        codes = [job.wait(host) for host in range(2)]
        # Long before the deadline of a collective, and that of the system. The machine may be busy.
        assert time.monotonic() - lost < LOST_S + END_S + 120, job.said()
        assert job.processes(0) + job.processes(1) == [], job.said()
    finally:
        job.close()
    assert codes == [123, 123], job.said()
    assert f"node {hosts[1]} is lost" in job.said() or f"node {hosts[0]} is lost" in job.said()


def test_the_servers_of_a_host_that_disappears_are_missed_and_named(tmp_path: Path, hosts: list[str]) -> None:
    write_recipe(tmp_path, family="qwen3")
    deadlines = ("--fleet.heartbeat-timeout-s", "10", "--fleet.update-timeout-s", "30")
    job = Job(tmp_path, hosts, *VLLM, *ENDLESS, *deadlines, server_nodes=1)
    try:
        job.wait_until(lambda: job.num_rows() >= 2)
        assert rows(job)[-1]["fleet/servers_up"] == 1
        assert job.processes(1, SERVER), job.said()
        ip("link", "set", link(1), "down")
        lost = time.monotonic()
        code = job.wait(0)
        # A server is asked again after up to 60 s, five times in all; the machine may be busy.
        assert time.monotonic() - lost < sum(_RESTART_DELAYS_S) + 5 * 10 + 120, job.said()
        assert code == 2
        assert job.processes(0) == [], job.said()
        # What the batch script does: the servers' own host has not heard of the end.
        job.tell_agent(1, signal.SIGUSR2)
        assert job.wait(1) == 0, job.said()
        assert job.processes(1) == [], job.said()
    finally:
        job.close()
    said = job.log(0).read_text()
    assert "error: 0 of 1 servers can answer, fewer than fleet.min_servers = 1; the server at http://10.77.0.2:" in said
