"""The random number generators of a rank: Python's, NumPy's, PyTorch's and megatron-core's, as tensors."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import load_file, save
from torch import Tensor

logger = logging.getLogger(__name__)


def random_state() -> dict[str, Tensor]:
    """A copy of every generator's state."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    state = {
        "python/words": torch.tensor([version, *words], dtype=torch.int64),
        "python/gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy/keys": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "numpy/position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy/gauss": torch.tensor([cached_gauss], dtype=torch.float64),
        "torch/cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["torch/cuda"] = torch.cuda.get_rng_state()
    trackers = {f"megatron/{name}": tracked for name, tracked in get_cuda_rng_tracker().get_states().items()}
    return state | {name: tracked.clone() for name, tracked in trackers.items()}


def set_random_state(state: dict[str, Tensor]) -> None:
    """Sets every generator that `state` knows."""
    version, *words = state["python/words"].tolist()
    gauss = state["python/gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy/position"].tolist()
    keys = state["numpy/keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy/gauss"])))
    torch.set_rng_state(state["torch/cpu"])
    if "torch/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch/cuda"])
    tracked = {name.removeprefix("megatron/"): value for name, value in state.items() if name.startswith("megatron/")}
    get_cuda_rng_tracker().set_states(tracked)


class RandomState:
    """The generators of every rank as a part of a checkpoint: a file for each rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def save_state(self, directory: Path, *, copy: bool) -> PendingRandomState:
        """Fixes this rank's state."""
        return PendingRandomState(directory / _file_name(self._rank), random_state())

    def load_state(self, directory: Path) -> None:
        """Takes up the state of the rank of this number; where there was none, keeps its own and says so."""
        file = directory / _file_name(self._rank)
        if not file.exists():
            logger.warning("the checkpoint has no random state for rank %d: it keeps its own", self._rank)
            return
        set_random_state(load_file(file))


class PendingRandomState:
    """One rank's file."""

    summary: Any = None

    def __init__(self, file: Path, state: dict[str, Tensor]) -> None:
        self._file, self._state = file, state

    def write(self) -> list[Path]:
        """Writes it, and flushes it to the disk."""
        with self._file.open("wb") as stream:
            stream.write(save(self._state))
            stream.flush()
            os.fsync(stream.fileno())
        return [self._file]

    def finish(self, summaries: Sequence[Any]) -> None:
        """Nothing is left to write."""


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
