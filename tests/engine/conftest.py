"""A tiny model on a grid of one rank, for tests that need no other layout, and ranks for those that do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.parallel import Mesh, open_mesh
from tests.engine import tiny
from tests.launch import RankPool


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path)
    return path


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh(ParallelConfig(), seed=0) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., None]]:
    """Runs a function on so many ranks: in this process, or in processes that are kept for the next test."""
    pools: dict[int, RankPool] = {}

    def run(world_size: int, function: Callable[..., None], *args: Any) -> None:
        if world_size == 1:
            function(*args)
            gc.collect()
        else:
            pools.setdefault(world_size, RankPool(world_size)).run(function, *args)

    yield run
    for pool in pools.values():
        pool.close()
