"""Weight updates that hold only what has changed. At the learning rates of PPO most 16-bit weights round to what they
were before the step.

    changes of a tensor    values [n] of its type, gaps [n] uint8: three bytes for each element that is sent

A gap is the number of elements between one that is sent and the one before it. Where it would exceed a byte, elements
that have not changed are sent as well. Both sides keep a copy of all weights in host memory, as servers load whole
tensors only.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

VALUE_BYTES = 2
MAX_CHANGED_SHARE = 0.25
"""With more changed elements than this a tensor travels whole."""
_MAX_STRIDE = 256
"""Between elements that are sent; a gap is one less."""
_LIST_BYTES = 64 * 2**20


def pack_changes(new: Tensor, changed: Tensor) -> Tensor:
    """The changes that lead to `new`: [3n] uint8. new: [N] of a 16-bit type; changed: [N] bool, where."""
    places = changed.nonzero().view(-1)
    strides = places.diff(prepend=places.new_full((1,), -1))
    num_sent = (strides - 1) // _MAX_STRIDE + 1  # for each changed element: itself, and those that bridge the way to it
    last = num_sent.cumsum(0) - 1
    sent = strides.new_full((int(num_sent.sum()),), _MAX_STRIDE)
    sent[last] = strides - _MAX_STRIDE * (num_sent - 1)
    values = new[sent.cumsum(0) - 1]
    return torch.cat([values.view(torch.uint8), (sent - 1).to(torch.uint8)])


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
        self._num_changed = self._num_elements = 0

    def begin(self) -> int | None:
        """The version that the next update changes; None where it is sent whole. What is not committed is forgotten."""
        base, self._version = self._version, None
        self._num_changed = self._num_elements = 0
        if base is None:
            self._copies.clear()
        return base

    def encode(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Of each tensor its changes, as bytes, or all of it in the servers' type: see `HeldCopies.decode`."""
        for name, weight in weights:
            new = weight.detach().to(self._dtype).reshape(-1)
            old = self._copies.get(name)
            self._num_elements += new.numel()
            if old is None:
                self._copies[name] = new.to("cpu", copy=True)
                self._num_changed += new.numel()
                yield name, new.view(weight.shape)
                continue
            there = old.to(new.device)
            changed = there.view(torch.int16) != new.view(torch.int16)
            num_changed = int(changed.count_nonzero())
            self._num_changed += num_changed
            is_whole = num_changed > MAX_CHANGED_SHARE * new.numel()
            yield name, new.view(weight.shape) if is_whole else pack_changes(new, changed)
            old.copy_(new)

    def commit(self, version: int) -> None:
        """The workers hold all that was encoded, and call it `version`."""
        self._version = version

    @property
    def changed_share(self) -> float:
        """Of all elements, of the last update."""
        return self._num_changed / max(1, self._num_elements)


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
