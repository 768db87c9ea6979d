"""An update to which several ranks send: rank 0 announces it, and all others follow.

rank 0            invites those who send -> sends ---+
other senders     hear of it             -> send ----+-> all learn whether all have succeeded
other ranks       hear of it             -> gather --+
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_orz.ranks import Ranks, exhausting
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.server_group import Sender
from megatron_orz.types import Metrics, NamedWeights, RepeatableWeights

Invitation = TypeVar("Invitation")


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What rank 0 announces."""

    connection: int
    """Number of the connection to these servers: with another one they are joined anew."""
    version: int
    invitations: Mapping[int, Any]
    """What each rank that sends needs to know; without any, there is no update."""


_NO_UPDATE = _Update(connection=0, version=0, invitations={})


class RankSenders(ABC, Generic[Invitation]):
    """The senders of all ranks, as one of the ranks sees them."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._num_connections = 0
        self._connection = 0
        self._sender: Sender | None = None
        self._has_announced = False

    @abstractmethod
    def share(self, weights: RepeatableWeights) -> RepeatableWeights:
        """What of the weights this rank needs. Collective."""

    @abstractmethod
    def _invite(self, clients: Sequence[ServerClient]) -> Mapping[int, Invitation]:
        """On rank 0: what each rank that sends needs to know of these servers."""

    @abstractmethod
    def _accept(self, invitation: Invitation) -> Sender:
        """On a rank that sends: joins the servers."""

    def to(self, clients: Sequence[ServerClient]) -> Sender:
        """On rank 0: a sender to these servers, wherever they are. Its `send` needs `leading` around it."""
        self._num_connections += 1
        return _ToAll(self, self._num_connections, self._invite(clients))

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
        if update.invitations:
            with suppress(ValueError, RuntimeError, OSError):
                self._take_part(update, weights)

    def lead(
        self, weights: NamedWeights, version: int, *, connection: int, invitations: Mapping[int, Invitation]
    ) -> None:
        """On rank 0: announces the update, and takes part. Raises RuntimeError for what fails on any rank."""
        self._has_announced = True
        update = _Update(connection=connection, version=version, invitations=invitations)
        self._take_part(self._ranks.broadcast(update), weights)

    def metrics(self) -> Metrics:
        """Of this rank's last update."""
        return self._sender.metrics() if self._sender is not None else {}

    def close(self) -> None:
        """Leaves the servers."""
        if self._sender is not None:
            self._sender.close()
        self._sender = None

    def _take_part(self, update: _Update, weights: NamedWeights) -> None:
        with self._ranks.share_fate("sending the weights"), exhausting(weights):
            if (invitation := update.invitations.get(self._ranks.rank)) is not None:
                if self._sender is None or self._connection != update.connection:
                    self.close()
                    self._sender, self._connection = self._accept(invitation), update.connection
                self._sender.send(weights, update.version)


class _ToAll(Generic[Invitation]):
    """A Sender to all servers."""

    def __init__(
        self, senders: RankSenders[Invitation], connection: int, invitations: Mapping[int, Invitation]
    ) -> None:
        self._senders = senders
        self._connection = connection
        self._invitations = invitations

    def send(self, weights: NamedWeights, version: int) -> None:
        """All servers hold the weights of `version` afterwards."""
        self._senders.lead(weights, version, connection=self._connection, invitations=self._invitations)

    def metrics(self) -> Metrics:
        """Of the last update, as rank 0 saw it."""
        return self._senders.metrics()

    def close(self) -> None:
        """Leaves the servers; the other ranks leave theirs when they hear of another connection."""
        self._senders.close()
