"""What one rank does for all: results and errors that every trainer rank learns of."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from megatron_orz.closeable import Closeable

# The other ranks wait for the one that works. Its own deadlines bound that wait, its death closes the sockets, which
# ends it at once, and the watchdog sees to the rest: a deadline here would only cut a long generation short.
_PATIENCE = timedelta(days=1)

T = TypeVar("T")


class RemoteError(RuntimeError):
    """Another rank failed at what all ranks do together."""


class Ranks(Closeable):
    """A gloo group over all trainer ranks, whatever the trainer's own groups run on.

    A single rank where torch.distributed is not initialised. Every method is collective, construction included.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, src=0, group=self._group)
        assert values[0] is not None
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
        values = [value] * self.size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def collect(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on rank 0; an empty list on the others."""
        values = [value] * self.size if self.rank == 0 else []
        if self._group is not None:
            dist.gather_object(value, values or None, dst=0, group=self._group)
        return values

    def share_fate(self, action: str) -> _SharedFate:
        """`with ranks.share_fate("generation"):` an error in the body on one rank is raised on every rank."""
        return _SharedFate(self, action)

    def close(self) -> None:
        """Leaves the group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


class exhausting:
    """`with exhausting(weights):` comes to the iterator's end, also when the body fails before.

    Its items may be gathered from all ranks: one that stops early keeps the others waiting.
    """

    def __init__(self, items: Iterator[object]) -> None:
        self._items = items

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            for _ in self._items:
                pass


class _SharedFate:
    def __init__(self, ranks: Ranks, action: str) -> None:
        self._ranks = ranks
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # Ctrl-C and exit reach every rank by themselves
        for rank, message in enumerate(self._ranks.gather(error and f"{type(error).__name__}: {error}")):
            if message is not None and error is None:
                raise RemoteError(f"{self._action} failed on rank {rank}: {message}")
