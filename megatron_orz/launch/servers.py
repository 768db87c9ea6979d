"""The inference servers of one node, for trainers on other nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from megatron_orz.config import Config
from megatron_orz.launch.node import Node
from megatron_orz.launch.notices import NodeError, Notices
from megatron_orz.rollout.process import SupervisedProcess
from megatron_orz.rollout.transports import SERVER_ARGUMENTS
from megatron_orz.rollout.vllm_server import vllm_launch

_POLL_S = 0.5
_HEALTH_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """The servers of one node among those of the job."""

    first: int
    """Number of the node's first server in the job."""
    count: int
    port: int
    """Of the first of them; the next ones follow."""


def notice_of(server: int) -> str:
    """The name of a server's notice."""
    return f"server-{server}"


def run_servers(
    config: Config,
    node: Node,
    share: Share,
    *,
    notices: Notices,
    logs: Path,
    is_stopped: Callable[[], bool],
    start_timeout_s: float,
) -> int:
    """Starts the servers of this node, publishes their addresses, and keeps them until `is_stopped()`.

    Returns the exit code: 1 when a server ended by itself. Raises ValueError and NodeError when one does not start.
    """
    fleet = replace(
        config.fleet, urls=(), gpus=(), num_servers=share.count, min_servers=1, port=share.port, colocated=False
    )
    with ExitStack() as stack:
        servers: dict[int, tuple[str, SupervisedProcess]] = {}
        for index in range(share.count):
            launch = vllm_launch(
                config.policy, fleet, index=index, transfer_arguments=SERVER_ARGUMENTS, host=node.address
            )
            number = share.first + index
            process = stack.enter_context(
                SupervisedProcess(
                    launch.command,
                    environment=launch.environment,
                    log_path=logs / f"server-{number}-{node.name}.log",
                )
            )
            servers[number] = f"http://{node.address}:{launch.port}", process
        _publish_all(servers, node, notices, is_stopped=is_stopped, timeout_s=start_timeout_s)
        while not is_stopped():
            for number, (_, process) in servers.items():
                if (code := process.exit_code()) is not None:
                    print(f"error: server {number} on node {node.name} ended with code {code}: {process.log_path}")
                    return 1
            time.sleep(_POLL_S)
    return 0


def check_answers(urls: Sequence[str]) -> None:
    """Raises NodeError when one of the published servers does not answer."""
    for url in urls:
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while not _is_healthy(url):
            if time.monotonic() > deadline:
                raise NodeError(
                    f"the server at {url} does not answer within {_ANSWER_TIMEOUT_S:g} s, though it did on its own "
                    "node; see that the nodes reach each other there, or set --interface"
                )
            time.sleep(_POLL_S)


def _publish_all(
    servers: dict[int, tuple[str, SupervisedProcess]],
    node: Node,
    notices: Notices,
    *,
    is_stopped: Callable[[], bool],
    timeout_s: float,
) -> None:
    """Publishes each server as soon as it answers."""
    deadline = time.monotonic() + timeout_s
    starting = dict(servers)
    while starting and not is_stopped():
        for number, (url, process) in list(starting.items()):
            if _is_healthy(url):
                notices.publish(notice_of(number), {"url": url, "node": node.to_json()})
                del starting[number]
            elif process.exit_code() is not None:
                raise NodeError(
                    f"server {number} on node {node.name} ended during its start; see {process.log_path}:\n"
                    f"{process.last_words()}"
                )
        if time.monotonic() > deadline:
            number = next(iter(starting))
            raise NodeError(
                f"server {number} on node {node.name} did not answer within {timeout_s:g} s; see "
                f"{servers[number][1].log_path}, or raise fleet.start_timeout_s"
            )
        time.sleep(_POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False)
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK
