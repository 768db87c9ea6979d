"""A fleet over several nodes: ranks of this machine play the nodes, and stand-ins the servers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_orz.config import FleetConfig, ModelConfig
from megatron_orz.ranks import Ranks
from megatron_orz.rollout import kinds, nodes, replica
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.rollout.node_servers import NodeServers, RemoteNode, RemoteServer
from megatron_orz.rollout.server_group import ServerGroup
from megatron_orz.rollout.servers import InferenceServer, Launch, ServerError, free_port
from megatron_orz.types import RepeatableWeights, Rollout
from tests.launch import run_ranks
from tests.rollout import stand_in
from tests.rollout.conftest import make_prompts, model_config
from tests.rollout.stand_in_fleet import SAMPLING, VersionSender, contents, expected

NUM_WEIGHTS = 4


def start_stand_in(
    kind: str, index: int, fleet: FleetConfig, model: ModelConfig, *, log_path: Path, host: str = "127.0.0.1"
) -> InferenceServer:
    port = fleet.port + index if fleet.port else free_port()
    command = [sys.executable, "-S", stand_in.__file__, str(port)]
    launch = Launch(command=command, environment=dict(os.environ), port=port, host=host)
    return InferenceServer(launch, start_timeout_s=fleet.start_timeout_s, log_path=log_path)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RemoteNode]:
    """A node with servers 2 and 3, of which the second cannot start."""
    port = free_port()

    def start(number: int, num_restarts: int) -> InferenceServer:
        if number == 3:
            raise ValueError("there is no model")
        config = FleetConfig(port=port, start_timeout_s=120)
        return start_stand_in("vllm", 0, config, model_config(tmp_path), log_path=tmp_path / f"{num_restarts}.log")

    with NodeServers("127.0.0.1", [2, 3], start) as servers:
        yield RemoteNode(rank=1, name="b", url=servers.url, server_urls=(f"http://127.0.0.1:{port}",))


def remote(node: RemoteNode, number: int, num_restarts: int = 0) -> RemoteServer:
    return RemoteServer(node.server_urls[0], node=node, number=number, num_restarts=num_restarts, start_timeout_s=120)


def children() -> list[psutil.Process]:
    """The stand-ins below this process, not their supervisors."""
    return [process for process in psutil.Process().children(recursive=True) if is_stand_in(process)]


def is_stand_in(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[2:3] == [stand_in.__file__]
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False


def test_a_remote_server_starts_dies_and_starts_again_at_its_place(node: RemoteNode, tmp_path: Path) -> None:
    server = remote(node, 2)
    server.wait_until_healthy()
    server.check_alive()
    (process,) = children()
    process.kill()
    with pytest.raises(
        ServerError, match=r"on node b, the server ended with exit code 137 during the run; see .*0\.log"
    ):
        server.check_alive(wait_s=60)
    again = remote(node, 2, num_restarts=1)
    again.wait_until_healthy()
    assert (tmp_path / "1.log").exists()
    assert "1.log" in again.describe_log()
    again.close()
    assert children() == []
    with pytest.raises(ServerError, match="the server does not run"):
        again.check_alive()


def test_what_a_node_refuses_is_told_in_its_words(node: RemoteNode) -> None:
    with pytest.raises(ValueError, match="node b: there is no model"):
        remote(node, 3).wait_until_healthy()
    order = {"server": 2, "num_restarts": 0}
    answer = httpx.post(f"{node.url}/start", json=order, headers={"Authorization": b"Bearer \xe9"}, trust_env=False)
    assert answer.status_code == 401
    assert children() == []


def test_a_node_that_is_gone_cannot_start_a_server_and_says_nothing_of_one() -> None:
    gone = RemoteNode(rank=1, name="b", url=f"http://127.0.0.1:{free_port()}", server_urls=("http://127.0.0.1:1",))
    server = remote(gone, 2)
    with pytest.raises(ServerError, match=r"node b cannot be told at .* to start server 2: ConnectError"):
        server.wait_until_healthy()
    server.check_alive()
    server.close()


class Sender(VersionSender):
    """Notes what this rank sends; a fault happens amid the next update."""

    num_connected: ClassVar[int] = 0
    sent: ClassVar[list[tuple[int, int, list[str]]]] = []
    faults: ClassVar[list[Callable[[], None]]] = []

    def __init__(self, clients: Sequence[ServerClient]) -> None:
        super().__init__(clients)
        Sender.num_connected += 1

    def send(self, weights: Any, version: int) -> None:
        for index, _ in enumerate(weights):
            if index == 1 and self.faults:
                self.faults.pop()()
        urls = [client.url for client in self._clients]  # type: ignore[attr-defined]
        super().send([], version)  # type: ignore[arg-type]
        self.sent.append((dist.get_rank(), version, urls))


def collective_weights() -> Iterator[tuple[str, torch.Tensor]]:
    """Like an engine's: each weight is gathered from all ranks."""
    for index in range(NUM_WEIGHTS):
        weight = torch.ones(1)
        dist.all_reduce(weight)
        yield str(index), weight


def on_one_node() -> Iterator[tuple[str, torch.Tensor]]:
    raise AssertionError("weights that the first rank alone gathers reach one node")
    yield


def weights() -> RepeatableWeights:
    return RepeatableWeights(collective_weights, gather_first=on_one_node)


def sender_of(*args: object, **options: object) -> Callable[[Sequence[ServerClient]], Sender]:
    return Sender


def _use_two_nodes(run_dir: Path) -> None:
    from megatron_orz.rollout import fleet as fleet_module

    # Three ranks: the first of node 0, then the two of node 1.
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(max(0, rank - 1)), "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo")
    nodes.start_server = kinds.start_server = start_stand_in  # type: ignore[assignment]
    fleet_module.weight_sender = sender_of  # type: ignore[assignment]
    replica._HEARTBEAT_S, replica._DEATH_WAIT_S = 0.2, 0.5
    replica._RESTART_DELAYS_S = (0.0, 0.1, 0.1, 0.1, 0.1)
    config = FleetConfig(kind="vllm", num_servers=4, min_servers=3, start_timeout_s=120)
    prompts, ranks = make_prompts(8), Ranks()
    with open_fleet(config, SAMPLING, model_config(run_dir), run_dir=run_dir) as fleet:
        assert isinstance(fleet, ServerFleet)
        assert len(children()) == (0 if rank == 2 else 2)

        def check(version: int) -> None:
            rollouts: list[Rollout] = fleet.generate(prompts, num_responses=3, seed=version)
            assert contents(rollouts) == expected(prompts, version=version, seed=version)

        for _ in range(2):
            fleet.update_weights(weights(), 0)
        check(0)
        # Each node's first rank sends to its own servers, and keeps its connection.
        sent = ranks.gather([(who, version, len(urls)) for who, version, urls in Sender.sent])
        assert sent == [[(0, 0, 2)] * 2, [(1, 0, 2)] * 2, []]
        assert ranks.gather(Sender.num_connected) == [1, 1, 0]

        # A server of node 1 is killed while it holds requests: it is started anew there, and gets the next weights.
        if rank == 1:
            children()[0].kill()
        check(0)
        _wait_for_restart(fleet, 1)
        assert len(children()) == (0 if rank == 2 else 2)
        fleet.update_weights(weights(), 1)
        check(1)
        assert ranks.gather(Sender.num_connected) == [2, 2, 0]

        # One dies amid the sending of its node: all are started anew, and the update is repeated.
        def kill() -> None:
            os.kill(children()[1].pid, signal.SIGKILL)
            raise RuntimeError("the connection broke")

        if rank == 1:
            Sender.faults = [kill]
        fleet.update_weights(weights(), 2)
        check(2)
        if rank == 0:
            assert fleet.metrics()["fleet/restarts"] == 5
            assert fleet.metrics()["fleet/servers_up"] == 4

        # What fails although all servers live ends the update on every rank, with the reason.
        def refuse(*args: object) -> None:
            raise RuntimeError("digests differ")

        if rank == 1:
            Sender.faults = [refuse]
        with pytest.raises(RuntimeError, match="failed on rank 1: RuntimeError: digests differ" if rank == 0 else "."):
            fleet.update_weights(weights(), 3)
        # All ranks have left the iterator at its end, and work together again.
        fleet.update_weights(weights(), 4)
        check(4)

        # So they do where rank 0 fails before there is anything for the others to take part in.
        if isinstance(group := fleet._servers, ServerGroup):
            group._connect = refuse  # type: ignore[assignment]
            group._drop_sender()
        with pytest.raises(RuntimeError, match="." if rank == 0 else "the weight update failed on rank 0"):
            fleet.update_weights(weights(), 5)
        assert not any(version == 5 for _, version, _ in Sender.sent)
    assert children() == []
    dist.destroy_process_group()


def _wait_for_restart(fleet: ServerFleet, num_restarts: int) -> None:
    deadline = time.monotonic() + 120
    group = fleet._servers
    while isinstance(group, ServerGroup) and not (
        group.metrics()["fleet/restarts"] == num_restarts and group.metrics()["fleet/servers_up"] == 4
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    Ranks().gather(None)


def test_every_node_starts_restarts_and_updates_its_own_servers(tmp_path: Path) -> None:
    run_ranks(3, _use_two_nodes, tmp_path)


def test_servers_that_cannot_be_spread_are_refused() -> None:
    assert FleetConfig(num_servers=4, port=8000).of_node(2) == FleetConfig(num_servers=2, port=8000)
    with pytest.raises(ValueError, match=r"fleet.num_servers 3 cannot be spread evenly over the 2 nodes"):
        FleetConfig(num_servers=3).of_node(2)
    with pytest.raises(ValueError, match=r"fleet.gpus \(0, 1\) names GPUs of one node"):
        FleetConfig(num_servers=2, gpus=(0, 1)).of_node(2)
