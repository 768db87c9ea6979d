"""Settings of all tests, and fixtures of several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.recipe import Finished

# How long one example takes says more about the machine than about the code. The same examples come in every run.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models run on one thread: two on a busy machine are many times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """An empty working directory, and no process left at the end."""
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children(recursive=True)
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe (`tests/recipe.py`) with its model and data, which tests read and leave as they are."""
    from tests.recipe import fill_home  # imports megatron-core

    place = tmp_path_factory.mktemp("home")
    fill_home(place)
    return place


@pytest.fixture(scope="session")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The recipe, run twice in the same place."""
    from tests.recipe import run_twice

    return run_twice(home, tmp_path_factory.mktemp("finished"))
