"""The ipc transport: memory that the trainer and servers on its machine share, so that nothing moves at all.

Workers that see the trainer's GPU open a handle of its memory. Where one does not, and on the CPU, they open a memory
file, which has no name and ends with the processes that hold it.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from megatron_orz.rollout.buckets import Bucket, num_payload_bytes, read_bucket
from megatron_orz.rollout.meeting import Meeting


class IPCTransport:
    """The trainer's half. The memory of a slot is made once, and again only when a larger tensor comes."""

    name = "ipc"

    def __init__(self) -> None:
        self._shared: dict[int, _SharedMemory] = {}
        self._on_device = False

    def connect(self, meeting: Meeting) -> None:
        """Learns which GPUs the workers see. Every announcement says where the memory is."""
        seen = [json.loads(meeting.store.get(f"gpus/{rank}")) for rank in range(1, 1 + meeting.num_workers)]
        own = _gpu_uuids()[torch.cuda.current_device()] if torch.cuda.is_available() else None
        self._on_device = own is not None and all(own in gpus for gpus in seen)

    def buffer(self, slot: int, num_bytes: int) -> Tensor:
        """Memory that other processes can open."""
        if slot not in self._shared or len(self._shared[slot].tensor) < num_bytes:
            if slot in self._shared:
                self._shared.pop(slot).close()
            self._shared[slot] = _DeviceMemory(num_bytes) if self._on_device else _HostMemory(num_bytes)
        return self._shared[slot].tensor

    def send(self, bucket: Bucket, slot: int) -> dict[str, Any]:
        """Waits until the bucket is filled."""
        if bucket.payload.is_cuda:
            torch.cuda.current_stream().synchronize()
        return {"slot": slot, **self._shared[slot].address}

    def close(self) -> None:
        """Gives the memory back."""
        for shared in self._shared.values():
            shared.close()
        self._shared.clear()


class IPCReceiver:
    """A worker's half: opens each memory once."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device) -> None:
        meeting.store.set(f"gpus/{rank}", json.dumps(_gpu_uuids()))
        self._device = device
        self._opened: dict[int, tuple[str, Tensor]] = {}

    def receive(self, message: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """The trainer's own memory, where the device can read it."""
        slot, address = message["slot"], message["address"]
        if slot not in self._opened or self._opened[slot][0] != address:
            self._opened.pop(slot, None)
            opened = _open_device_memory(address) if message["kind"] == "cuda" else _open_host_memory(address)
            self._opened[slot] = (address, opened)
        payload = self._opened[slot][1][: num_payload_bytes(message)]
        return read_bucket(message, payload.to(self._device)).tensors()

    def close(self) -> None:
        """Closes the memory."""
        self._opened.clear()


class _HostMemory:
    """A memory file, by the trainer's descriptor of it: nothing is left behind however either side ends, and the size
    of /dev/shm, small in containers, does not limit it."""

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("weights")
        os.ftruncate(self._descriptor, num_bytes)
        self.tensor = torch.frombuffer(mmap.mmap(self._descriptor, num_bytes), dtype=torch.uint8)
        inode = os.fstat(self._descriptor).st_ino  # a descriptor's number may come back, with other memory behind it
        self.address = {"kind": "cpu", "address": f"/proc/{os.getpid()}/fd/{self._descriptor}:{inode}"}

    def close(self) -> None:
        os.close(self._descriptor)
        self.tensor = torch.empty(0, dtype=torch.uint8)


class _DeviceMemory:
    """Memory of the trainer's GPU, by its CUDA handle."""

    def __init__(self, num_bytes: int) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        _, arguments = reduce_tensor(self.tensor)
        # What stands before these, the device aside, is the same for all memories.
        handle = [{"bytes": base64.b64encode(x).decode()} if isinstance(x, bytes) else x for x in arguments[7:]]
        gpu = _gpu_uuids()[self.tensor.get_device()]
        self.address = {"kind": "cuda", "address": json.dumps({"gpu": gpu, "num_bytes": num_bytes, "handle": handle})}

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()


_SharedMemory = _HostMemory | _DeviceMemory


def _open_host_memory(address: str) -> Tensor:
    path, _, _ = address.rpartition(":")
    try:
        with open(path, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    except OSError as error:
        raise RuntimeError(
            f"cannot open the trainer's memory ({error}); a server of another container or user needs "
            "fleet.transport gloo or disk"
        ) from error


def _open_device_memory(address: str) -> Tensor:
    memory = json.loads(address)
    device = _gpu_uuids().index(memory["gpu"])  # of this process, which may number them otherwise
    handle = [base64.b64decode(x["bytes"]) if isinstance(x, dict) else x for x in memory["handle"]]
    opened: Tensor = rebuild_cuda_tensor(
        Tensor, (memory["num_bytes"],), (1,), 0, torch.TypedStorage, torch.uint8, device, *handle
    )
    return opened


def _gpu_uuids() -> list[str]:
    """The GPUs this process sees, in its own order."""
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
