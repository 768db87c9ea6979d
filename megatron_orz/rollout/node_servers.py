"""The servers of another node: its first rank starts and ends them, as rank 0 orders over HTTP.

    POST /start  {"server": 3, "num_restarts": 0}
    POST /check  {"server": 3, "wait_s": 2.0, "during": "the run"}    {"failure": "..."} when it has ended
    POST /log    {"server": 3}                                        {"log": "..."}
    POST /stop   {"server": 3}

Every order carries the run's token. What cannot start is answered with 400, what fails with 500: {"error": "..."}.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx

from megatron_orz.closeable import Closeable
from megatron_orz.rollout.servers import InferenceServer, ServerError, ServerProcess
from megatron_orz.rollout.token import authorization

_ORDER_TIMEOUT_S = 30.0
"""To end a server, and to start it anew, takes up to half of this."""
_CONNECT_TIMEOUT_S = 5.0
_MAX_ORDER_BYTES = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RemoteNode:
    """A node other than that of rank 0, as it tells rank 0."""

    rank: int
    """Its first rank."""
    name: str
    url: str
    """Of its `NodeServers`."""
    server_urls: tuple[str, ...]
    """Where its servers answer once they run; one that is started anew answers at the same place."""


class NodeServers(Closeable):
    """Starts and ends the servers of this node when rank 0 says so; a context manager that ends all of them.

    address: of this node, where orders come in. servers: their numbers in the run.
    start: starts one of them, given its number and that of its restarts.
    """

    def __init__(self, address: str, servers: Sequence[int], start: Callable[[int, int], InferenceServer]) -> None:
        self._places = {server: _Place() for server in servers}
        self._start = start
        self._is_closed = False
        self._http = _OrderServer((address, 0), self)
        self.url = f"http://{address}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="node-servers", daemon=True)

    def carry_out(self, order: str, content: dict[str, Any]) -> dict[str, Any]:
        """The answer to an order. Raises ValueError, ServerError or OSError."""
        number = content["server"]
        place = self._places[number]
        with place.lock:
            match order:
                case "/start":
                    place.end()
                    if self._is_closed:  # an order that was under way meanwhile
                        raise ServerError("the node's servers are ended, with its ranks")
                    place.process = self._start(number, content["num_restarts"])
                    return {}
                case "/stop":
                    place.end()
                    return {}
                case "/check":
                    return place.check(content)
                case "/log":
                    return {"log": "" if place.process is None else place.process.describe_log()}
                case _:
                    raise AssertionError(f"there is no order {order}")

    def close(self) -> None:
        """Takes no more orders, and ends all servers."""
        self._is_closed = True
        self._http.shutdown()
        self._http.server_close()
        for place in self._places.values():
            with place.lock:
                place.end()

    def __enter__(self) -> Self:
        self._thread.start()
        return self


class RemoteServer(ServerProcess):
    """A server that another node starts, restarts and ends; its failures are told as those of one on this node.

    number: of the server in the run.
    """

    def __init__(self, url: str, *, node: RemoteNode, number: int, num_restarts: int, start_timeout_s: float) -> None:
        """Starts nothing; `wait_until_healthy` does."""
        super().__init__(url, start_timeout_s=start_timeout_s)
        self._node_url = node.url
        self._name = node.name
        self._number = number
        self._num_restarts = num_restarts

    def wait_until_healthy(self) -> None:
        """Has the node start the server; returns when it answers here.

        Raises ValueError for what cannot start, and ServerError for what does not.
        """
        try:
            self._order("start", num_restarts=self._num_restarts)
        except httpx.TransportError as error:
            raise ServerError(
                f"node {self._name} cannot be told at {self._node_url} to start server {self._number}: {error!r}"
            ) from error
        super().wait_until_healthy()

    def check_alive(self, *, wait_s: float = 0.0, during: str = "the run") -> None:
        """Raises ServerError when the node says that the server has ended, or ends within `wait_s`.

        A node that does not answer says nothing of it: whether the server answers is for the watch to find out.
        """
        try:
            failure = self._order("check", timeout_s=wait_s + _ORDER_TIMEOUT_S, wait_s=wait_s, during=during)["failure"]
        except httpx.TransportError:
            time.sleep(wait_s)
            return
        if failure is not None:
            raise ServerError(f"on node {self._name}, {failure}")

    def describe_log(self) -> str:
        """As the node tells it."""
        try:
            return f"on node {self._name}, {self._order('log')['log']}"
        except (httpx.TransportError, ServerError) as error:
            return f"its log on node {self._name} ({error!r})"

    def close(self) -> None:
        """Has the node end the server. One that cannot be told ends it with its first rank."""
        try:
            self._order("stop")
        except (httpx.TransportError, ServerError) as error:
            _log.info("node %s cannot be told to end server %d: %r", self._name, self._number, error)

    def _order(self, order: str, *, timeout_s: float = _ORDER_TIMEOUT_S, **content: Any) -> dict[str, Any]:
        response = httpx.post(
            f"{self._node_url}/{order}",
            json={"server": self._number, **content},
            headers=authorization(),
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            trust_env=False,
        )
        answer: dict[str, Any] = response.json()
        if response.status_code == httpx.codes.OK:
            return answer
        kind = ValueError if response.status_code == httpx.codes.BAD_REQUEST else ServerError
        raise kind(f"node {self._name}: {answer['error']}")


@dataclass
class _Place:
    """Where a server runs, or has run."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    process: InferenceServer | None = None

    def end(self) -> None:
        if self.process is not None:
            self.process.close()
        self.process = None

    def check(self, content: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            return {"failure": "the server does not run"}
        try:
            self.process.check_alive(wait_s=content["wait_s"], during=content["during"])
        except ServerError as error:
            return {"failure": str(error)}
        return {"failure": None}


class _OrderServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], servers: NodeServers) -> None:
        super().__init__(address, _OrderHandler)
        self.servers = servers
        self.authorization = authorization()["Authorization"].encode()


class _OrderHandler(BaseHTTPRequestHandler):
    server: _OrderServer
    timeout = _ORDER_TIMEOUT_S

    def do_POST(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if not secrets.compare_digest(given, self.server.authorization):
            self._answer(401, {"error": "this node answers its own run alone"})
            return
        try:
            content = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), _MAX_ORDER_BYTES)))
            self._answer(200, self.server.servers.carry_out(self.path, content))
        except ValueError as error:
            self._answer(400, {"error": str(error)})
        except (ServerError, OSError) as error:
            self._answer(500, {"error": str(error)})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        """The order's outcome is told to rank 0, which logs what matters."""
