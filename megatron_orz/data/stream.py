"""Items in an endless order that a resumed run takes up where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class EpochStream(Generic[Item]):
    """The items in an endless order: every epoch holds each of them once, reshuffled by (seed, epoch).

    The whole state is `cursor`, the number of items taken so far: a stream built with the cursor of another goes on
    exactly where that one stopped.
    """

    def __init__(self, items: Sequence[Item], *, seed: int, cursor: int = 0) -> None:
        if not items:
            raise ValueError("a stream needs at least one item; add data files or raise the limit on their length")
        if cursor < 0:
            raise ValueError(f"cursor {cursor} is negative; it counts the items taken so far")
        self.cursor = cursor
        self._items = items
        self._seed = seed

    def take(self, num_items: int) -> list[Item]:
        """The next items, across as many epochs as it takes."""
        first, last = self.cursor, self.cursor + num_items
        self.cursor = last
        epoch_size = len(self._items)
        return [
            self._items[index]
            for epoch in range(first // epoch_size, -(-last // epoch_size))
            for index in self._order(epoch)[max(first - epoch * epoch_size, 0) : last - epoch * epoch_size]
        ]

    def upcoming(self, num_items: int) -> list[Item]:
        """What `take` would return."""
        return EpochStream(self._items, seed=self._seed, cursor=self.cursor).take(num_items)

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng((self._seed, epoch)).permutation(len(self._items)).tolist()
        return order
