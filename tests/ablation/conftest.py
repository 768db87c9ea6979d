"""A recipe with a tiny random model and its data, as a user's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe import write_home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of recipe.py."""
    home = tmp_path_factory.mktemp("home")
    write_home(home)
    return home
