"""New weights for servers on several nodes: the first rank of every node gives them to the servers of its own.

    rank 0            announces an update -> sends to its servers --+
    first ranks       hear of it          -> send to theirs       --+-> all learn whether all have succeeded
    other ranks       hear of it          -> gather the weights   --+

Every rank gathers the whole weights, as ranks of different nodes share a copy of the model, so that the transport is
that of servers on the rank's own machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from megatron_orz.ranks import Ranks, exhausting
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.node_servers import RemoteNode
from megatron_orz.rollout.server_group import Sender
from megatron_orz.types import Metrics, NamedWeights


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What rank 0 announces."""

    connection: int
    """Number of the connection to these servers: with another one they are joined anew."""
    version: int
    urls: Mapping[int, Sequence[str]]
    """The servers of each rank that sends; without any, there is no update."""


_NO_UPDATE = _Update(connection=0, version=0, urls={})


class NodeSenders:
    """The senders of all nodes, as one of the ranks sees them.

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
        self._connect = connect
        self._find = find
        self._rank_of = {url: node.rank for node in nodes for url in node.server_urls}
        self._ranks = ranks
        self._num_connections = 0
        self._connection = 0
        self._sender: Sender | None = None
        self._clients: list[ServerClient] = []
        self._has_announced = False

    def to(self, clients: Sequence[ServerClient]) -> Sender:
        """On rank 0: a sender to these servers, wherever they are. Its `send` needs `leading` around it."""
        self._num_connections += 1
        return _ToAll(self, self._num_connections, [client.url for client in clients])

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On rank 0, around an update, or what may become one: the other ranks, which `follow`, learn which."""
        self._has_announced = False
        try:
            yield
        finally:
            if not self._has_announced:
                self._ranks.broadcast(_NO_UPDATE)

    def follow(self, weights: NamedWeights) -> None:
        """On the other ranks: takes part in the update of rank 0, which raises what fails."""
        update: _Update = self._ranks.broadcast(None)
        if update.urls:
            with suppress(ValueError, RuntimeError, OSError):
                self._take_part(update, weights)

    def send(self, weights: NamedWeights, version: int, *, connection: int, urls: Sequence[str]) -> None:
        """On rank 0: announces the update, and takes part. Raises RuntimeError for what fails on any node."""
        of_ranks: dict[int, list[str]] = {}
        for url in urls:
            of_ranks.setdefault(self._rank_of.get(url, 0), []).append(url)
        self._has_announced = True
        update = self._ranks.broadcast(_Update(connection=connection, version=version, urls=of_ranks))
        self._take_part(update, weights)

    def metrics(self) -> Metrics:
        """Of the last update to this node's servers."""
        return self._sender.metrics() if self._sender is not None else {}

    def close(self) -> None:
        """Leaves the servers of this node."""
        if self._sender is not None:
            self._sender.close()
        for client in self._clients:
            client.close()
        self._sender, self._clients = None, []

    def _take_part(self, update: _Update, weights: NamedWeights) -> None:
        with self._ranks.share_fate("sending the weights"), exhausting(weights):
            if urls := update.urls.get(self._ranks.rank):
                if self._sender is None or self._connection != update.connection:
                    self.close()
                    self._clients = [self._find(url) for url in urls]
                    self._sender, self._connection = self._connect(self._clients), update.connection
                self._sender.send(weights, update.version)


class _ToAll:
    """A Sender to the servers of all nodes."""

    def __init__(self, senders: NodeSenders, connection: int, urls: Sequence[str]) -> None:
        self._senders = senders
        self._connection = connection
        self._urls = urls

    def send(self, weights: NamedWeights, version: int) -> None:
        """All servers hold the weights of `version` afterwards."""
        self._senders.send(weights, version, connection=self._connection, urls=self._urls)

    def metrics(self) -> Metrics:
        """Of the last update to the servers of rank 0's node."""
        return self._senders.metrics()

    def close(self) -> None:
        """Leaves the servers of this node; the other ranks leave theirs when they hear of another connection."""
        self._senders.close()
