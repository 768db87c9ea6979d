"""Settings of all tests, and fixtures of several."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# How long one example takes says more about the machine than about the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models run on one thread: two on a busy machine are many times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
