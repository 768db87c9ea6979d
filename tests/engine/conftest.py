"""A tiny model on a grid of one rank, for tests that need no other layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.parallel import Mesh, open_mesh
from tests.engine import tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path)
    return path


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh(ParallelConfig(), seed=0) as mesh:
        yield mesh
