"""How an SGLang server is started: its checks, its command line and its environment. It needs CUDA."""

from __future__ import annotations

import importlib.util
import sys

import torch

from megatron_orz.config import FleetConfig, ModelConfig
from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.servers import MODEL_NAME, Launch, base_environment, free_port, visible_gpus


def sglang_launch(model: ModelConfig, fleet: FleetConfig, *, index: int, host: str = "127.0.0.1") -> Launch:
    """How the `index`-th server of a fleet is started. Raises ValueError for what cannot start."""
    if importlib.util.find_spec("sglang") is None:
        raise ValueError(
            "fleet.kind is sglang, but sglang is not installed; install it in this environment, "
            "name servers that run already in fleet.urls, or use --fleet.kind vllm or local"
        )
    if not torch.cuda.is_available():
        raise ValueError("fleet.kind is sglang, which needs a GPU, and there is none; use --fleet.kind vllm or local")
    environment = base_environment()
    gpus = fleet.server_gpus(index, num_gpus=torch.cuda.device_count())
    environment["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus, visible=environment.get("CUDA_VISIBLE_DEVICES"))
    port = fleet.port + index if fleet.port else free_port()
    return Launch(command=_command(model, fleet, host=host, port=port), environment=environment, port=port, host=host)


def _command(model: ModelConfig, fleet: FleetConfig, *, host: str, port: int) -> list[str]:
    """The command line; what a request must not be able to change is fixed here."""
    return [
        *(sys.executable, "-m", "megatron_orz.rollout.sglang_main"),
        *("--model-path", str(model.path), "--served-model-name", MODEL_NAME),
        *("--host", host, "--port", str(port)),
        *("--dtype", fleet.dtype or model.dtype, "--context-length", str(fleet.max_model_tokens)),
        *("--tp-size", str(fleet.server_tp)),
        *(("--max-running-requests", str(fleet.max_running)) if fleet.max_running else ()),
        *("--mem-fraction-static", str(fleet.gpu_memory_share)),
        *("--weight-version", str(INITIAL_VERSION)),
        "--enable-metrics",  # by which the watch sees that tokens are computed
        *(["--enable-memory-saver"] if fleet.colocated else []),
    ]
