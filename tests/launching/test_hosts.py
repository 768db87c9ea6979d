"""Several hosts as network namespaces: the ranks meet across them, and a host that disappears ends the run in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.logs import read_metrics
from tests.faults.tiny_run import NUM_STEPS, write_recipe
from tests.launching.hosts import TIMEOUT_S, Job, ip, link, open_hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are namespaces"),
]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with open_hosts(2) as names:
        yield names


def test_ranks_meet_across_hosts(tmp_path: Path, hosts: list[str]) -> None:
    write_recipe(tmp_path)
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
    write_recipe(tmp_path)
    job = Job(tmp_path, hosts, "--ppo.num-steps", "100000", "--parallel.timeout-s", str(deadline_s))
    try:
        job.wait_until(lambda: job.num_rows() >= 2)
        ip("link", "set", link(1), "down")
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
    assert job.processes(0) + job.processes(1) == [], said


def test_a_host_without_the_interface_ends_the_job_on_all_hosts_at_once(tmp_path: Path, hosts: list[str]) -> None:
    ip("-n", hosts[1], "link", "set", "eth0", "name", "eth7")
    write_recipe(tmp_path)
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
