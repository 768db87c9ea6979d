"""What an agent is made of: notices, facts of nodes, ports, processes and signals."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_orz.launch import agent
from megatron_orz.launch.exchange import check_clocks
from megatron_orz.launch.lifeline import Lifeline
from megatron_orz.launch.node import Node, check_equal, node_address, visible_gpus
from megatron_orz.launch.notices import NodeError, Notices
from megatron_orz.launch.processes import Process, ProcessGroup, Signals
from megatron_orz.launch.ray_cluster import RemoteAgent, check_cluster
from megatron_orz.rollout.servers import choose_ports
from megatron_orz.rollout.token import TOKEN_VARIABLE

NODE = Node(
    name="a", address="10.0.0.1", gpus=["H200, 141 GiB"] * 8, versions={"torch": "2.13"}, source="f00", free_gib=50.0
)


def test_notices_are_found_when_they_come_and_only_those_of_the_attempt(tmp_path: Path) -> None:
    Notices(tmp_path, "1.0").publish("server-0", {"url": "stale"})
    notices = Notices(tmp_path, "1.1")
    threading.Timer(0.3, lambda: notices.publish("server-0", {"url": "right"})).start()
    assert notices.wait(["server-0"], timeout_s=120) == [{"url": "right"}]


def test_a_missing_notice_is_named_at_the_deadline(tmp_path: Path) -> None:
    notices = Notices(tmp_path, "1.0")
    notices.publish("node-0", {})
    with pytest.raises(NodeError, match=r"1 of 2 did not come within 0.3 s: node-1 in .*notices/1.0"):
        notices.wait(["node-0", "node-1"], timeout_s=0.3)


def test_a_failure_ends_the_wait_at_once_with_its_reason(tmp_path: Path) -> None:
    notices = Notices(tmp_path, "1.0")
    notices.publish_failure("node-1", "node b has no disk")
    started = time.monotonic()
    with pytest.raises(NodeError, match=r"^node b has no disk$"):
        notices.wait(["node-0", "node-1"], timeout_s=300)
    assert time.monotonic() - started < 120


def test_a_stale_notice_of_the_same_attempt_is_refused_and_kept(tmp_path: Path) -> None:
    Notices(tmp_path, "1.0").publish("server-0", {"url": "old"})
    again = Notices(tmp_path, "1.0")
    with pytest.raises(ValueError, match=r"server-0.json is there already: a stale file"):
        again.publish("server-0", {"url": "new"})
    assert again.wait(["server-0"], timeout_s=1) == [{"url": "old"}]
    Notices(tmp_path, "1.1").remove_others()
    assert not (tmp_path / "notices/1.0").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": ["H200, 141 GiB"] * 7}, "nodes a and b are not equal: 8 x H200, 141 GiB and 7 x H200, 141 GiB"),
        ({"gpus": []}, "8 x H200, 141 GiB and no GPU"),
        ({"versions": {"torch": "2.12"}}, "nodes a and b are not equal: torch 2.13 and 2.12"),
        ({"versions": {"torch": "2.13", "vllm": "1"}}, "vllm absent and 1"),
        ({"source": "bad"}, "source files of megatron_orz with digests f00 and bad"),
    ],
)
def test_unequal_nodes_are_refused(change: dict[str, object], message: str) -> None:
    check_equal([NODE, replace(NODE, name="b", address="10.0.0.2", free_gib=1.0)])
    with pytest.raises(ValueError, match=message):
        check_equal([NODE, replace(NODE, name="b", **change)])  # type: ignore[arg-type]


def test_a_node_that_lacks_gpus_or_disk_is_refused() -> None:
    NODE.check(num_gpus=8, min_free_gib=50)
    with pytest.raises(ValueError, match="node a has 8 visible GPUs, and the job was told of 9"):
        NODE.check(num_gpus=9, min_free_gib=0)
    with pytest.raises(ValueError, match=r"node a sees 50.0 GiB free .* less than --min-free-gib 51"):
        NODE.check(num_gpus=8, min_free_gib=51)


def test_this_node_tells_the_same_twice_and_what_the_system_says(tmp_path: Path) -> None:
    here = Node.here(address="127.0.0.1", run_dir=tmp_path / "not/yet/there")
    assert here == replace(Node.from_json(here.to_json()), free_gib=here.free_gib)
    assert here.versions["Python"] == sys.version.split()[0]
    stat = os.statvfs(tmp_path)
    assert here.free_gib == pytest.approx(stat.f_bavail * stat.f_frsize / 2**30, abs=1)


@pytest.mark.parametrize(("visible", "expected"), [(None, 3), ("0,2", 2), ("", 0), ("-1", 0)])
def test_gpus_are_those_that_this_process_may_use(
    visible: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor gpu in 0 1 2; do echo 'H200, 141 GiB'; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == ["H200, 141 GiB"] * expected


def test_a_first_node_that_reaches_no_server_tells_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have found nothing wrong, and their ranks would wait for those of this node."""

    def unreachable(urls: list[str]) -> None:
        raise NodeError(f"the server at {urls[0]} does not answer")

    monkeypatch.setattr(agent, "check_answers", unreachable)
    for name, value in ((agent.ATTEMPT, "1.0"), (agent.NODE_RANK, "0"), (TOKEN_VARIABLE, "a-token")):
        monkeypatch.setenv(name, value)
    arguments = agent.Arguments(
        role="trainer",
        state_dir=tmp_path,
        num_machines=1,
        num_nodes=1,
        num_processes=1,
        num_servers=1,
        num_gpus=0,
        port=0,
        start_timeout_s=60,
        server_timeout_s=60,
        min_free_gib=0,
        max_skew_s=1,
    )
    notices, node = Notices(tmp_path, "1.0"), Node.here(address="127.0.0.1", run_dir=tmp_path)
    notices.publish("server-0", {"url": "http://10.0.0.9:8000", "node": node.to_json()})
    with Signals() as signals, pytest.raises(NodeError, match="does not answer"):
        agent.Agent(arguments, ["recipe.py"], signals).train()
    reason = "the server at http://10.0.0.9:8000 does not answer"
    assert notices.peek("trainer-end-0") == {"name": node.name, "code": 2, "reason": reason}


def test_a_port_in_use_is_refused_and_free_ones_follow_each_other() -> None:
    choose = partial(choose_ports, "127.0.0.1", options="--server-port")
    first = choose(0, count=3)
    assert choose(first, count=3) == first
    with socket.create_server(("127.0.0.1", first + 2)):
        assert choose(first, count=2) == first
        with pytest.raises(
            ValueError, match=rf"port {first + 2} of 127.0.0.1 is in use .* set --server-port to others"
        ):
            choose(first, count=3)


def test_an_interface_gives_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_address("lo", is_alone=False) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"has no interface ib7 with an IPv4 address; it has .*lo"):
        node_address("ib7", is_alone=False)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    assert node_address(None, is_alone=True) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"leads to 127.0.1.1, where other nodes do not reach it; set --interface"):
        node_address(None, is_alone=False)


def test_clocks_apart_are_named() -> None:
    check_clocks([(100.0, "a"), (100.9, "b")], max_skew_s=1.0)
    with pytest.raises(ValueError, match=r"clocks of nodes a and c differ by 3.5 s, more than 1 s"):
        check_clocks([(100.0, "a"), (100.9, "b"), (103.5, "c")], max_skew_s=1.0)


def test_a_node_that_goes_without_a_word_is_lost_to_the_others() -> None:
    port = choose_ports("127.0.0.1", 0, count=1, options="")
    join = partial(Lifeline.join, "127.0.0.1", port)
    with Lifeline.host("127.0.0.1", port, num_nodes=3) as first, join(node_rank=1) as second:
        with join(node_rank=2) as third:
            assert [node.lost() for node in (first, second, third)] == [None] * 3
        assert first.lost() is None, "one has left in order"
        with socket.create_connection(("127.0.0.1", port), timeout=30):
            pass
        assert first.lost() is None, "it was none of the job"
        second._lines.pop(0).close()  # as the system does for a process that was killed
        assert node_lost_to(first) == 1
    with Lifeline.host("127.0.0.1", port, num_nodes=2) as first, join(node_rank=1) as second:
        assert first.lost() is None
        first._lines.pop(1).close()
        assert node_lost_to(second) == 0


def node_lost_to(other: Lifeline) -> int | None:
    """What is closed at one end is seen at the other a moment later."""
    deadline = time.monotonic() + 60
    while other.lost() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return other.lost()


def script(text: str, log: Path | None = None, name: str = "rank 0") -> Process:
    return Process(name=name, command=["bash", "-c", text], environment=dict(os.environ), log=log)


def test_the_first_failure_is_the_exit_code_and_its_last_words_are_told(tmp_path: Path) -> None:
    failing = script("echo 'error: no model'; exit 2", tmp_path / "log", "rank 1")
    with Signals() as signals, ProcessGroup([script("exit 0"), failing]) as group:
        assert group.wait(signals) == 2
        assert group.describe_failure() == f"rank 1 ended with exit code 2 ({tmp_path / 'log'}): error: no model"


def test_signals_are_passed_on_and_the_code_comes_back(tmp_path: Path) -> None:
    text = f"trap 'exit 75' USR1; touch {tmp_path}/$$; while true; do sleep 0.05; done"
    with Signals() as signals, ProcessGroup([script(text), script(text)]) as group:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert group.wait(signals, timeout_s=120) == 75


def test_a_signal_before_the_agent_runs_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote = RemoteAgent()
    remote.tell(int(signal.SIGTERM))
    assert remote.run(["sleep", "600"], str(tmp_path), {}) == 128 + signal.SIGTERM


def test_ranks_that_stay_after_a_failure_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_orz.launch.processes.END_S", 0.5)
    stuck = script("trap '' TERM; while true; do sleep 0.05; done", name="rank 1")
    monkeypatch.setattr("megatron_orz.launch.processes._KILL_S", 0.5)
    with Signals() as signals, ProcessGroup([script("exit 3"), stuck]) as group:
        assert group.wait(signals, timeout_s=120) == 3


def test_nothing_is_left_running_after_a_deadline(tmp_path: Path) -> None:
    with Signals() as signals, ProcessGroup([script(f"echo $$ > {tmp_path}/pid; sleep 600")]) as group:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        with pytest.raises(TimeoutError, match="rank 0 did not end within 0 s"):
            group.wait(signals, timeout_s=0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_cluster_with_too_few_machines_is_refused() -> None:
    machine = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    bundle = {"CPU": 64.0, "GPU": 8.0}
    check_cluster([bundle, bundle], [machine, machine])
    with pytest.raises(ValueError, match="the job needs 2 machines with 64 CPUs, 8 GPUs, and 1 of the cluster's 2"):
        check_cluster([bundle, bundle], [machine, {"Alive": True, "Resources": {"CPU": 64.0}}, {"Alive": False}])
