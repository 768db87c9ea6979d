"""Runs a vLLM server as a training run would start it, for runs elsewhere that name it in `fleet.urls`.

export ORZ_SERVER_TOKEN=...     # here and where the runs are: the server answers no one else
python tools/serve.py path/to/model --port 8000 --max-model-tokens 4096
python tools/serve.py path/to/model --host 10.0.0.7 --port 8000 --tp 2     # reachable by others: see below
python examples/demo.py --fleet.urls http://127.0.0.1:8000

Whoever reaches the server can replace its weights and stop it: give it an address on a private network only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_orz.command_line import plain_errors, read_command
from megatron_orz.config import DType, FleetConfig, ModelConfig, OptimizerConfig
from megatron_orz.rollout.token import TOKEN_VARIABLE
from megatron_orz.rollout.transports import SERVER_ARGUMENTS
from megatron_orz.rollout.vllm_server import vllm_launch


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Runs a vLLM server for training runs, in the foreground."""

    model: tyro.conf.Positional[Path]
    """Directory of the checkpoint the runs start from."""
    host: str = "127.0.0.1"
    port: int = 8000
    tp: int = 1
    """Tensor-parallel size, on the first GPUs that are visible."""
    dtype: DType = "bfloat16"
    max_model_tokens: int = 8192
    """Longest prompt plus response."""
    gpu_memory_share: float = 0.9
    kv_cache_gib: float = 1.0
    """Memory of the key-value cache on the CPU."""
    cpu_threads: int | None = None


def main() -> None:
    """Replaces this process by the server."""
    with plain_errors():
        arguments = read_command(Arguments)
        if not os.environ.get(TOKEN_VARIABLE):
            raise ValueError(
                f"{TOKEN_VARIABLE} is not set, so that the server would answer no run; set it to the same secret in "
                "the environment of the server and of its runs"
            )
        fleet = FleetConfig(
            port=arguments.port,
            server_tp=arguments.tp,
            max_model_tokens=arguments.max_model_tokens,
            gpu_memory_share=arguments.gpu_memory_share,
            kv_cache_gib=arguments.kv_cache_gib,
            cpu_threads=arguments.cpu_threads,
            swaps_within_responses=True,  # runs of either kind may ask
        )
        # The optimizer is the trainer's business; a server has none.
        model = ModelConfig(path=arguments.model, optimizer=OptimizerConfig(lr=1.0), dtype=arguments.dtype)
        launch = vllm_launch(model, fleet, index=0, transfer_arguments=SERVER_ARGUMENTS, host=arguments.host)
        os.execve(launch.command[0], list(launch.command), dict(launch.environment))


if __name__ == "__main__":
    main()
