"""New weights for servers on several nodes: the first rank of every node gives them to the servers of its own.

Every rank gathers the whole weights, as ranks of different nodes share a copy of the model, so that the transport is
that of servers on the rank's own machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_orz.ranks import Ranks
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.node_servers import RemoteNode
from megatron_orz.rollout.rank_senders import RankSenders
from megatron_orz.rollout.server_group import Sender
from megatron_orz.types import RepeatableWeights


class NodeSenders(RankSenders[Sequence[str]]):
    """The senders of all nodes. A rank that sends is told the URLs of its servers.

    connect: joins this rank and some servers. find: the client of the server at a URL.
    nodes: those but that of rank 0.
    """

    def __init__(
        self,
        connect: Callable[[Sequence[ServerClient]], Sender],
        find: Callable[[str], ServerClient],
        *,
        nodes: Sequence[RemoteNode],
        ranks: Ranks,
    ) -> None:
        super().__init__(ranks)
        self._connect = connect
        self._find = find
        self._rank_of = {url: node.rank for node in nodes for url in node.server_urls}
        self._clients: list[ServerClient] = []

    def share(self, weights: RepeatableWeights) -> RepeatableWeights:
        """All of them."""
        return weights

    def close(self) -> None:
        """Leaves the servers of this node."""
        super().close()
        for client in self._clients:
            client.close()
        self._clients = []

    def _invite(self, clients: Sequence[ServerClient]) -> Mapping[int, Sequence[str]]:
        of_ranks: dict[int, list[str]] = {}
        for client in clients:
            of_ranks.setdefault(self._rank_of.get(client.url, 0), []).append(client.url)
        return of_ranks

    def _accept(self, invitation: Sequence[str]) -> Sender:
        self._clients = [self._find(url) for url in invitation]
        return self._connect(self._clients)
