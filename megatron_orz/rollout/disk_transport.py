"""The disk transport: safetensors files in a folder that the trainer and every server see, for servers that no other
way reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_orz.rollout.buckets import Bucket
from megatron_orz.rollout.meeting import Meeting


class DiskTransport:
    """The trainer's half. A file appears whole, under its final name, and is removed when all workers have read it."""

    name = "disk"

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._buffers: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}
        self._num_files = 0

    def connect(self, meeting: Meeting) -> None:
        """Makes the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def buffer(self, slot: int, num_bytes: int) -> Tensor:
        """Memory of the CPU."""
        self._remove(slot)
        if slot not in self._buffers or len(self._buffers[slot]) < num_bytes:
            self._buffers[slot] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffers[slot]

    def send(self, bucket: Bucket, slot: int) -> dict[str, Any]:
        """Writes the file. Raises OSError when that fails."""
        path = self._folder / f"{self._num_files}.safetensors"
        self._num_files += 1
        unfinished = path.with_suffix(".tmp")
        self._files[slot] = path
        try:
            save_file(dict(bucket.tensors()), unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return {"path": str(path)}

    def close(self) -> None:
        """Removes what is left."""
        for slot in list(self._files):
            self._remove(slot)
        self._buffers.clear()

    def _remove(self, slot: int) -> None:
        if (path := self._files.pop(slot, None)) is not None:
            path.unlink(missing_ok=True)


class DiskReceiver:
    """A worker's half."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device) -> None:
        self._device = device

    def receive(self, message: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """The tensors of a file."""
        tensors = load_file(message["path"], device=str(self._device))
        return [(name, tensors[name]) for name in message["names"]]

    def close(self) -> None:
        """Nothing is held."""
