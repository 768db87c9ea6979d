"""The transport a config names, and what a server must be started with to receive over any of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_orz.config import FleetConfig
from megatron_orz.rollout.disk_transport import DiskTransport
from megatron_orz.rollout.gloo_transport import GlooTransport
from megatron_orz.rollout.ipc_transport import IPCTransport
from megatron_orz.rollout.nccl_transport import NCCLTransport
from megatron_orz.rollout.transport import Transport

SERVER_ARGUMENTS: tuple[str, ...] = (
    *("--worker-extension-cls", "megatron_orz.rollout.vllm_worker.WorkerExtension"),
    *("--weight-transfer-config", json.dumps({"backend": "megatron_orz"})),
)


def build_transport(fleet: FleetConfig, *, folder: Path, is_one_machine: bool) -> Transport:
    """The trainer's half of `fleet.transport`.

    folder: of the disk transport.
    is_one_machine: all servers run beside the trainer.

    Raises ValueError for a transport that does not reach the servers.
    """
    has_gpus = torch.cuda.is_available()
    kind = fleet.transport
    if kind == "auto":
        kind = "ipc" if is_one_machine else "nccl" if has_gpus else "gloo"
    if kind == "ipc" and not is_one_machine:
        raise ValueError("fleet.transport is ipc, but a server runs on another machine; set nccl, gloo or disk")
    if kind == "nccl" and not has_gpus:
        raise ValueError("fleet.transport is nccl, but there is no GPU here; set ipc, gloo or disk")
    match kind:
        case "ipc":
            return IPCTransport()
        case "nccl":
            return NCCLTransport()
        case "disk":
            return DiskTransport(folder)
        case _:
            return GlooTransport()
