"""Connections between the agents of a job, by which they learn that a node is gone.

A host that disappears closes nothing: who waits for its ranks in a collective without a deadline of its own, or for the
store of the rendezvous, may wait until the system gives their connections up, a quarter of an hour. These connections
carry no data; the kernel probes them, and gives them up after LOST_S. All lead to the first node.
"""

from __future__ import annotations

import socket
from typing import Self

from megatron_orz.closeable import Closeable
from megatron_orz.launch.notices import NodeError

LOST_S = 45
"""After which a node that does not answer is lost."""
_NUM_PROBES = 6
_JOIN_TIMEOUT_S = 60.0
_HELLO_TIMEOUT_S = 2.0
_NUMBER_BYTES = 4
_END = b"end"
"""What an agent says when it leaves in order; before it, the number of its node."""


class Lifeline(Closeable):
    """The connections of one agent; a context manager that leaves in order."""

    def __init__(
        self, *, listener: socket.socket | None = None, num_nodes: int = 0, to_first: socket.socket | None = None
    ) -> None:
        """listener, num_nodes: of the first node. to_first: of the others."""
        self._listener = listener
        self._num_nodes = num_nodes
        self._lines = {} if to_first is None else {0: to_first}  # to other nodes, by their number
        self._lost: int | None = None

    @classmethod
    def host(cls, address: str, port: int, *, num_nodes: int) -> Self:
        """That of the first node, before the others know of it."""
        listener = socket.create_server((address, port), backlog=num_nodes)
        listener.setblocking(False)
        return cls(listener=listener, num_nodes=num_nodes)

    @classmethod
    def join(cls, address: str, port: int, *, node_rank: int) -> Self:
        """That of another node; address and port are the first one's. Raises NodeError where that is not reached."""
        try:
            line = socket.create_connection((address, port), timeout=_JOIN_TIMEOUT_S)
        except OSError as error:
            raise NodeError(f"the first node is not reached at {address}:{port} ({error}); set --interface") from error
        line.sendall(node_rank.to_bytes(_NUMBER_BYTES, "big"))
        return cls(to_first=_probed(line))

    def lost(self) -> int | None:
        """The number of a node that has gone without a word; None while there is none. Does not wait."""
        self._accept()
        for node, line in list(self._lines.items()):
            try:
                said = line.recv(len(_END))
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            del self._lines[node]
            line.close()
            if said != _END:
                self._lost = node
        return self._lost

    def close(self) -> None:
        """Leaves the others, in order."""
        self._accept()
        for line in self._lines.values():
            try:
                line.sendall(_END)
            except OSError:
                continue
            finally:
                line.close()
        self._lines.clear()
        if self._listener is not None:
            self._listener.close()
        self._listener = None

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                line, _ = self._listener.accept()
            except BlockingIOError:
                return
            line.settimeout(_HELLO_TIMEOUT_S)
            try:
                node = int.from_bytes(line.recv(_NUMBER_BYTES), "big")
            except OSError:
                node = 0
            if 0 < node < self._num_nodes:
                self._lines[node] = _probed(line)
            else:  # somebody else
                line.close()


def _probed(line: socket.socket) -> socket.socket:
    """A connection that the kernel probes while nothing is said, and never waits for here."""
    idle_s = LOST_S // 3
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, (LOST_S - idle_s) // _NUM_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_S),
    ):
        line.setsockopt(level, option, value)
    line.setblocking(False)
    return line
