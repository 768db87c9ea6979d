"""The ipc transport: memory that the trainer and servers on its machine share, so that nothing moves at all.

On a GPU the workers open a handle of the trainer's device memory; on the CPU, a memory file that has no name and ends
with the processes that hold it.
"""

from __future__ import annotations

import base64
import mmap
import os
import pickle
from typing import Any

import torch
from torch import Tensor

from megatron_orz.rollout.buckets import Bucket, num_payload_bytes, read_bucket
from megatron_orz.rollout.meeting import Meeting


class IPCTransport:
    """The trainer's half. The memory of a slot is made once, and again only when a larger tensor comes."""

    name = "ipc"

    def __init__(self) -> None:
        self._shared: dict[int, _SharedMemory] = {}

    def connect(self, meeting: Meeting) -> None:
        """Nothing to do: every announcement says where the memory is."""

    def buffer(self, slot: int, num_bytes: int) -> Tensor:
        """Memory that other processes can open."""
        if slot not in self._shared or len(self._shared[slot].tensor) < num_bytes:
            if slot in self._shared:
                self._shared.pop(slot).close()
            self._shared[slot] = _DeviceMemory(num_bytes) if torch.cuda.is_available() else _HostMemory(num_bytes)
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
        from torch.multiprocessing.reductions import reduce_tensor

        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        _, arguments = reduce_tensor(self.tensor)
        self.address = {"kind": "cuda", "address": base64.b64encode(pickle.dumps(arguments)).decode()}

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()


_SharedMemory = _HostMemory | _DeviceMemory


def _open_host_memory(address: str) -> Tensor:
    path, _, _ = address.rpartition(":")
    with open(path, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


def _open_device_memory(address: str) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    opened: Tensor = rebuild_cuda_tensor(*pickle.loads(base64.b64decode(address)))
    return opened
