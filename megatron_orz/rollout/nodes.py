"""The nodes of a run whose fleet is spread over several: which there are, and which servers each of them starts.

    rank 0             drives all servers; its node's are its own processes
    the first rank     of every other node starts the servers there as rank 0 orders (`node_servers.py`), and gives them
                       new weights (`node_senders.py`)

The servers of a run are numbered over the nodes, the same number on each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_orz.config import FleetConfig, ModelConfig
from megatron_orz.ranks import Ranks
from megatron_orz.rollout.kinds import ServerKind, server_log, start_server
from megatron_orz.rollout.meeting import address_towards
from megatron_orz.rollout.node_servers import NodeServers, RemoteNode
from megatron_orz.rollout.servers import InferenceServer, choose_ports
from megatron_orz.rollout.token import server_token, share_token


@contextmanager
def open_nodes(
    kind: ServerKind, fleet: FleetConfig, model: ModelConfig, *, run_dir: Path, ranks: Ranks
) -> Iterator[list[RemoteNode]]:
    """The nodes but that of rank 0 in their order; none where one node has all servers, or others started them.

    Collective. Raises ValueError where the servers cannot be spread evenly.
    """
    firsts = first_ranks(ranks)
    if fleet.urls or len(firsts) == 1:
        yield []
        return
    share = fleet.of_node(len(firsts))
    share_token(ranks.broadcast(server_token() if ranks.rank == 0 else None))
    with ExitStack() as stack:
        own = None
        with ranks.share_fate("opening the nodes"):
            if ranks.rank in firsts[1:]:
                own = _open_node(stack, kind, share, model, run_dir, node=firsts.index(ranks.rank), rank=ranks.rank)
        yield [node for node in ranks.gather(own) if node is not None]
        ranks.gather(None)  # rank 0 has ended its servers: until then, a node that leaves would be a failure to it


def first_ranks(ranks: Ranks) -> list[int]:
    """Those of all nodes, in their order. Collective."""
    return [rank for rank, local_rank in enumerate(ranks.gather(_local_rank(ranks.rank))) if local_rank == 0]


def _open_node(
    stack: ExitStack, kind: ServerKind, share: FleetConfig, model: ModelConfig, run_dir: Path, *, node: int, rank: int
) -> RemoteNode:
    address = address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    port = choose_ports(address, share.port, count=share.num_servers, options="fleet.port")
    first = node * share.num_servers
    started = replace(share, port=port)

    def start(number: int, num_restarts: int) -> InferenceServer:
        log_path = server_log(run_dir, kind, number, num_restarts)
        return start_server(kind, number - first, started, model, log_path=log_path, host=address)

    servers = stack.enter_context(NodeServers(address, range(first, first + share.num_servers), start))
    return RemoteNode(
        rank=rank,
        name=socket.gethostname(),
        url=servers.url,
        server_urls=tuple(f"http://{address}:{port + index}" for index in range(share.num_servers)),
    )


def _local_rank(rank: int) -> int:
    return int(os.environ.get("LOCAL_RANK", rank))
