"""The trainer's ranks, as a fleet sees them."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

# The other ranks wait for the one that works. Its own deadlines bound that wait, and its death closes the sockets,
# which ends it at once: a deadline here would only add a second, shorter limit to a long generation.
_PATIENCE = timedelta(days=1)


class Ranks:
    """A gloo group over all trainer ranks, or a single rank where torch.distributed is not initialised.

    Tensors stay on the CPU, whatever the trainer's own groups run on. Building it is collective.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def share_fate(self, action: str) -> _SharedFate:
        """`with ranks.share_fate("generation"):` an error in the body on any rank is raised on every rank."""
        return _SharedFate(self, action)

    def broadcast(self, tensor: Tensor, *, source: int) -> Tensor:
        """Fills `tensor` with the one of rank `source`: same shape and type on all ranks."""
        if self.size > 1:
            dist.broadcast(tensor, src=source, group=self._group)
        return tensor

    def gather_messages(self, message: str | None) -> list[str | None]:
        """Every rank's message, in the order of the ranks."""
        messages: list[str | None] = [message]
        if self.size > 1:
            messages = [None] * self.size
            dist.all_gather_object(messages, message, group=self._group)
        return messages

    def close(self) -> None:
        """Leaves the group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


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
        messages = self._ranks.gather_messages(None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            for rank, message in enumerate(messages):
                if message is not None:
                    raise RuntimeError(f"{self._action} failed on rank {rank}: {message}")
