"""Weight updates that hold only what has changed. At the learning rates of PPO most 16-bit weights round to what they
were before the step.

    changes of a tensor    values [n] of its type, gaps [n] uint8: three bytes for each element that is sent

A gap is the number of elements between one that is sent and the one before it. Every 256th element is always sent, so
that no gap exceeds a byte. Both sides keep a copy of all weights in host memory, as servers load whole tensors only.

Imported on both sides: nothing but torch and numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

VALUE_BYTES = 2
MAX_SENT_SHARE = 1 / 3
"""With more than this to send, which is half of its bytes, a tensor travels whole."""
_PERIOD = 256
_LIST_BYTES = 64 * 2**20


def pack_changes(old: Tensor, new: Tensor) -> Tensor | None:
    """The changes that make `new` of `old`: [3n] uint8; None where these are too many. Both are [N], of the same 16-bit
    type."""
    old, new = old.view(torch.int16), new.view(torch.int16)
    is_sent = old != new
    is_sent[_PERIOD - 1 :: _PERIOD] = True
    if int(is_sent.count_nonzero()) > MAX_SENT_SHARE * len(new):
        return None
    places = is_sent.nonzero().view(-1) if is_sent.is_cuda else torch.from_numpy(np.flatnonzero(is_sent.numpy()))
    gaps = places.diff(prepend=places.new_full((1,), -1)) - 1
    return torch.cat([new[places].view(torch.uint8), gaps.to(torch.uint8)])


def apply_changes(old: Tensor, changes: Tensor) -> None:
    """Makes the new weights of the old ones, [N] of a 16-bit type, in place. Raises RuntimeError for other sizes."""
    num_sent, rest = divmod(len(changes), VALUE_BYTES + 1)
    values, gaps = changes.split([VALUE_BYTES * num_sent, num_sent + rest])
    places = (gaps.to(torch.int64) + 1).cumsum(0) - 1
    if rest or (num_sent and int(places[-1]) >= len(old)):
        raise RuntimeError(f"{len(changes)} bytes of changes do not belong to a tensor of {len(old)} elements")
    old[places] = values.clone().view(old.dtype)  # a copy begins at an address that fits the type


class SentCopies:
    """The trainer's side: copies of what the workers hold, if they hold anything.

    dtype: of the servers' weights, 16 bits.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._copies: dict[str, Tensor] = {}
        self._version: int | None = None
        self.num_sent = self.num_elements = 0
        """Of the last update."""

    def begin(self) -> int | None:
        """The version that the next update changes; None where it is sent whole. What is not committed is forgotten."""
        base, self._version = self._version, None
        self.num_sent = self.num_elements = 0
        if base is None:
            self._copies.clear()
        return base

    def encode(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Of each tensor its changes, as bytes, or all of it in the servers' type: see `HeldCopies.decode`."""
        for name, weight in weights:
            new = weight.detach().to(self._dtype).reshape(-1)
            changes = None
            if name in self._copies:
                changes = pack_changes(self._copies[name].to(new.device), new)
                self._copies[name].copy_(new)
            else:
                self._copies[name] = new.to("cpu", copy=True)
            self.num_elements += len(new)
            self.num_sent += len(new) if changes is None else len(changes) // (VALUE_BYTES + 1)
            yield name, new.view(weight.shape) if changes is None else changes

    def commit(self, version: int) -> None:
        """The workers hold all that was encoded, and call it `version`."""
        self._version = version


class HeldCopies:
    """A worker's side: copies of what the trainer has sent."""

    def __init__(self, device: torch.device) -> None:
        """device: of the model."""
        self._device = device
        self._copies: dict[str, Tensor] = {}
        self._version: int | None = None

    def begin(self, base: int | None) -> None:
        """An update of `base` comes; None: all weights come. Raises RuntimeError if the copies are not of that version:
        no update can follow then but a whole one."""
        held, self._version = self._version, None
        if base is None:
            self._copies.clear()
        elif base != held:
            raise RuntimeError(
                f"the changes are those of weights of version {base}, but this worker holds "
                f"{'none' if held is None else f'version {held}'}; all weights must be sent again"
            )

    def decode(self, tensors: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """The whole tensors of a bucket, on the model's device, some at a time."""
        some: list[tuple[str, Tensor]] = []
        for name, tensor in tensors:
            if tensor.dtype != torch.uint8:
                self._copies[name] = tensor.clone()
            else:
                apply_changes(self._copies[name].view(-1), tensor)
            some.append((name, self._copies[name].to(self._device)))
            if sum(whole.nbytes for _, whole in some) >= _LIST_BYTES:
                yield some
                some = []
        if some:
            yield some

    def commit(self, version: int) -> None:
        """The update is complete."""
        self._version = version
