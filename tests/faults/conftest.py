"""What runs that are killed share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.tiny_run import write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("home"))
