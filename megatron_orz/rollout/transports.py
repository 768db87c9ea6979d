"""The transport a config names, and what a server must be started with to receive over any of them."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

import torch

from megatron_orz.config import FleetConfig, TransportKind
from megatron_orz.rollout.disk_transport import DiskTransport
from megatron_orz.rollout.gloo_transport import GlooTransport
from megatron_orz.rollout.ipc_transport import IPCTransport
from megatron_orz.rollout.nccl_transport import NCCLTransport
from megatron_orz.rollout.transport import Transport

SERVER_ARGUMENTS: tuple[str, ...] = (
    *("--worker-extension-cls", "megatron_orz.rollout.vllm_worker.WorkerExtension"),
    *("--weight-transfer-config", json.dumps({"backend": "megatron_orz"})),
)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def choose_transport(fleet: FleetConfig) -> TransportKind:
    """`fleet.transport`, or the fastest one that reaches the servers. Raises ValueError for one that does not."""
    has_gpus = torch.cuda.is_available()
    is_one_machine = is_on_loopback(fleet)
    if fleet.transport == "ipc" and fleet.kind == "sglang":
        raise ValueError("fleet.transport is ipc, by which SGLang's servers get no weights; set nccl, gloo or disk")
    if fleet.transport == "ipc" and not is_one_machine:
        raise ValueError(
            f"fleet.transport is ipc, but not all of fleet.urls {fleet.urls} are on this machine; "
            "set nccl, gloo or disk"
        )
    if fleet.transport == "nccl" and not has_gpus:
        raise ValueError("fleet.transport is nccl, but there is no GPU here; set ipc, gloo or disk")
    if fleet.transport == "nccl" and _shares_gpu(fleet):
        raise ValueError(
            "fleet.transport is nccl, whose groups hold every GPU once, and a server gets the first, which rank 0 has; "
            "name others in fleet.gpus, or set fleet.transport to ipc (vllm), gloo or disk"
        )
    if fleet.transport != "auto":
        return fleet.transport
    if fleet.kind == "sglang":
        return "nccl" if has_gpus and not _shares_gpu(fleet) else "disk"
    if is_one_machine:
        return "ipc"
    return "nccl" if has_gpus else "gloo"


def is_on_loopback(fleet: FleetConfig) -> bool:
    """Whether all servers are on the machine of rank 0, at addresses that no other machine reaches."""
    return all(urlsplit(url).hostname in _LOOPBACK for url in fleet.urls)


def _shares_gpu(fleet: FleetConfig) -> bool:
    """Whether a server that the run starts is on the GPU of rank 0, which is the first."""
    return not fleet.urls and (not fleet.gpus or 0 in fleet.gpus)


def build_transport(kind: TransportKind, *, folder: Path) -> Transport:
    """The trainer's half. folder: of the disk transport."""
    match kind:
        case "ipc":
            return IPCTransport()
        case "nccl":
            return NCCLTransport()
        case "gloo":
            return GlooTransport()
        case "disk":
            return DiskTransport(folder)
        case "auto":
            raise AssertionError("choose_transport comes first")
