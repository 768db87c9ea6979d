"""The kinds of inference servers: how each is started or found, talked to, and given new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from megatron_orz.config import FleetConfig, ModelConfig
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.replica import Running
from megatron_orz.rollout.server_group import Sender
from megatron_orz.rollout.servers import InferenceServer, Launch
from megatron_orz.rollout.sglang_client import SGLangClient
from megatron_orz.rollout.sglang_sender import SGLangSender
from megatron_orz.rollout.sglang_server import sglang_launch
from megatron_orz.rollout.transport import WeightSender
from megatron_orz.rollout.transports import SERVER_ARGUMENTS, build_transport, choose_transport
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.vllm_server import vllm_launch
from megatron_orz.rollout.vllm_spans import SpanVLLMClient

ServerKind: TypeAlias = Literal["vllm", "sglang"]


def server_runs(
    kind: ServerKind, fleet: FleetConfig, model: ModelConfig, *, run_dir: Path
) -> list[tuple[str, Callable[[int], Running]]]:
    """A name for each server, and what starts or finds it (see `Replica`)."""
    if fleet.urls:
        return [(f"the server at {url}", partial(_find, kind, url, fleet)) for url in fleet.urls]
    if fleet.num_servers == 1:
        return [("the server", partial(_start, kind, 0, kind, fleet, model, run_dir))]
    return [
        (f"server {index}", partial(_start, kind, index, f"{kind}-{index}", fleet, model, run_dir))
        for index in range(fleet.num_servers)
    ]


def weight_sender(
    kind: ServerKind, fleet: FleetConfig, model: ModelConfig, *, run_dir: Path
) -> Callable[[Sequence[ServerClient]], Sender]:
    """What joins the trainer and some servers for weight updates. Raises ValueError for a transport that cannot be."""
    folder = run_dir / "weights"
    if kind == "sglang":
        return partial(SGLangSender, model_path=model.path, folder=folder, timeout_s=fleet.update_timeout_s)
    choose_transport(fleet)
    return partial(_connect_vllm, fleet=fleet, folder=folder)


def _find(kind: ServerKind, url: str, fleet: FleetConfig, num_restarts: int) -> Running:
    return Running(client=_client(kind, url, fleet), process=None)


def _start(
    kind: ServerKind,
    index: int,
    log_name: str,
    fleet: FleetConfig,
    model: ModelConfig,
    run_dir: Path,
    num_restarts: int,
) -> Running:
    suffix = f"-restart-{num_restarts}" if num_restarts else ""
    process = InferenceServer(
        _launch(kind, index, fleet, model),
        start_timeout_s=fleet.start_timeout_s,
        log_path=run_dir / f"{log_name}{suffix}.log",
    )
    return Running(client=_client(kind, process.url, fleet), process=process)


def _launch(kind: ServerKind, index: int, fleet: FleetConfig, model: ModelConfig) -> Launch:
    if kind == "sglang":
        return sglang_launch(model, fleet, index=index)
    return vllm_launch(model, fleet, index=index, transfer_arguments=SERVER_ARGUMENTS)


def _client(kind: ServerKind, url: str, fleet: FleetConfig) -> ServerClient:
    timeout_s = fleet.request_timeout_s
    if kind == "sglang":
        return SGLangClient(url, request_timeout_s=timeout_s)
    vllm_client = SpanVLLMClient if fleet.swaps_within_responses else VLLMClient
    return vllm_client(url, request_timeout_s=timeout_s)


def _connect_vllm(clients: Sequence[VLLMClient], *, fleet: FleetConfig, folder: Path) -> WeightSender:
    """folder: of weights on their way over the disk."""
    sender = WeightSender(
        clients,
        build_transport(choose_transport(fleet), folder=folder),
        timeout_s=fleet.update_timeout_s,
        verification=fleet.verification,
        keeps_requests=fleet.swaps_within_responses,
        delta=fleet.delta,
    )
    try:
        sender.connect()
    except RuntimeError:
        sender.close()
        raise
    return sender
