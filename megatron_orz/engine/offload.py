"""Device memory lent to someone else for a while: storages are emptied and later filled again, in place.

Views stay valid: whatever shares a storage before (a parameter, its place in megatron-core's flat buffer, the
optimizer's shard of it) shares it afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Offload:
    """The storages of one model, in device memory or in host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []
        # Pinning memory is slow, so that the buffers are kept for the next time.
        self._free_buffers: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def is_active(self) -> bool:
        return bool(self._kept)

    def release(self, *, keep: Iterable[Tensor], drop: Iterable[Tensor]) -> int:
        """Frees the tensors' storages; contents of `keep` move to host memory. Returns the freed bytes."""
        assert not self.is_active, "already offloaded"
        kept, dropped = self._storages(keep), self._storages(drop)
        for storage in kept:
            buffer = self._take_buffer(storage.nbytes())
            buffer.copy_(_bytes(storage), non_blocking=True)
            self._kept.append((storage, buffer))
        self._dropped = [(storage, storage.nbytes()) for storage in dropped]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        num_bytes = sum(storage.nbytes() for storage in kept + dropped)
        for storage in kept + dropped:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return num_bytes

    def restore(self) -> None:
        """Allocates the storages again: `keep` as it was, bit for bit, `drop` as zeros."""
        for storage, num_bytes in self._dropped:
            storage.resize_(num_bytes)
            _bytes(storage).zero_()
        for storage, buffer in self._kept:
            storage.resize_(buffer.numel())
            _bytes(storage).copy_(buffer, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        for _, buffer in self._kept:
            self._free_buffers[buffer.numel()].append(buffer)
        self._kept, self._dropped = [], []

    def _storages(self, tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
        """Each storage on the device once, empty ones left out."""
        storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == self._device)
        return list({storage.data_ptr(): storage for storage in storages if storage.nbytes()}.values())

    def _take_buffer(self, num_bytes: int) -> Tensor:
        if self._free_buffers[num_bytes]:
            return self._free_buffers[num_bytes].pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[n] uint8 over the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
