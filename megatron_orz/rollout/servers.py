"""Starts, watches and stops the process of an inference server."""

from __future__ import annotations

import os
import random
import socket
import tempfile
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from megatron_orz.closeable import Closeable
from megatron_orz.rollout.process import SupervisedProcess
from megatron_orz.rollout.token import TOKEN_VARIABLE, server_token

PORTS = range(15000, 32000)
"""Below those of outgoing connections, which begin at 32768."""

MODEL_NAME = "policy"
"""What requests call the model, whatever its directory."""

_PACKAGE_ROOT = Path(__file__).parents[2]
_HEALTH_POLL_S = 0.25
_HEALTH_TIMEOUT_S = 5.0

# A server that inherits the trainer's place in its process group would try to join it, or look for torchrun's store in
# place of its own (TORCHELASTIC_USE_AGENT_STORE). torchrun also sets OMP_NUM_THREADS=1 for its many ranks, while the
# server has the cores to itself when the ranks wait for it.
_TORCHRUN_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
}
_TORCHRUN_PREFIX = "TORCHELASTIC_"


class ServerError(RuntimeError):
    """A server did not start, died, refused a request or did not answer in time."""


class RefusedError(ServerError):
    """A server refused a request as wrong, as every other server would."""


class DeadlineError(ServerError):
    """A server did not answer in time."""


class UnreachableError(ServerError):
    """There is no connection to a server, or no longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How the process of a server is started."""

    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    host: str = "127.0.0.1"
    """The address of this machine that the server listens on."""


class ServerProcess(Closeable):
    """A server of this run, on this node or on another one."""

    def __init__(self, url: str, *, start_timeout_s: float) -> None:
        self.url = url
        self._start_timeout_s = start_timeout_s

    def wait_until_healthy(self) -> None:
        """Returns when the server answers.

        Raises ServerError as soon as the server ends, and when it takes longer than fleet.start_timeout_s.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while not self._is_healthy():
            self.check_alive(wait_s=_HEALTH_POLL_S, during="its start")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server did not answer within fleet.start_timeout_s = {self._start_timeout_s:g} s; "
                    f"raise it, or look for the reason in {self.describe_log()}"
                )

    @abstractmethod
    def check_alive(self, *, wait_s: float = 0.0, during: str = "the run") -> None:
        """Raises ServerError with the end of the log when the server has ended, or ends within `wait_s`."""

    @abstractmethod
    def describe_log(self) -> str:
        """Where the server writes, and the end of that."""

    def _is_healthy(self) -> bool:
        try:
            answer = httpx.get(f"{self.url}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False)
        except httpx.TransportError:
            return False
        return answer.status_code == httpx.codes.OK


class InferenceServer(ServerProcess):
    """A server process of this run on this machine; a context manager that stops it with all its processes."""

    def __init__(self, launch: Launch, *, start_timeout_s: float, log_path: Path) -> None:
        """Starts the process; `wait_until_healthy` returns when it answers."""
        super().__init__(f"http://{launch.host}:{launch.port}", start_timeout_s=start_timeout_s)
        # Servers leave sockets behind where temporary files go.
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-orz-", ignore_cleanup_errors=True)
        self._process = SupervisedProcess(
            launch.command, environment={**launch.environment, "TMPDIR": self._scratch.name}, log_path=log_path
        )

    @property
    def log_path(self) -> Path:
        """What the server writes."""
        return self._process.log_path

    @property
    def pid(self) -> int:
        """The process above all of the server's."""
        return self._process.pid

    def check_alive(self, *, wait_s: float = 0.0, during: str = "the run") -> None:
        """Raises ServerError with the end of the log when the server has ended, or ends within `wait_s`."""
        exit_code = self._process.exit_code(wait_s=wait_s)
        if exit_code is not None:
            raise ServerError(f"the server ended with exit code {exit_code} during {during}; see {self.describe_log()}")

    def close(self) -> None:
        """Ends all processes of the server, and removes its temporary files."""
        self._process.close()
        self._scratch.cleanup()

    def describe_log(self) -> str:
        """Its path, what went wrong in it, and its last lines."""
        return f"{self.log_path}:\n{self._process.last_words()}"


def base_environment() -> dict[str, str]:
    """The trainer's, less its place in a process group, plus the token, and this package for Python to find."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_VARIABLES and not name.startswith(_TORCHRUN_PREFIX)
    }
    if "TORCHELASTIC_RUN_ID" in os.environ:
        environment.pop("OMP_NUM_THREADS", None)
    search_path = [str(_PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(search_path), TOKEN_VARIABLE: server_token()}


def visible_gpus(gpus: Sequence[int], *, visible: str | None) -> str:
    """The CUDA_VISIBLE_DEVICES of a server on `gpus`, which count within the trainer's own, `visible`."""
    if visible is None:
        return ",".join(map(str, gpus))
    names = visible.split(",")
    return ",".join(names[gpu] for gpu in gpus)


def choose_ports(address: str, port: int, *, count: int, options: str) -> int:
    """The first of `count` ports of this address that follow each other and are free: `port`, or any for 0.

    options: what sets the ports. Raises ValueError when one of them is in use. Those chosen here are none of those that
    the system gives to outgoing connections.
    """
    if port:
        for taken in (candidate for candidate in range(port, port + count) if not _is_free(address, candidate)):
            raise ValueError(
                f"port {taken} of {address} is in use on node {socket.gethostname()}; set {options} to others, or to "
                "0 for any"
            )
        return port
    for candidate in random.SystemRandom().sample(PORTS[:-count], 100):
        if all(_is_free(address, candidate + offset) for offset in range(count)):
            return candidate
    raise ValueError(
        f"no free ports were found on node {socket.gethostname()} from {PORTS.start} to {PORTS.stop - 1}; end what "
        f"listens there, or set {options}"
    )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at the moment.

    It is none of those that the system gives to outgoing connections, which might take it before it is bound.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port was found from {PORTS.start} to {PORTS.stop - 1}; set fleet.port")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        # As the listener will: an old connection that is still closing is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
