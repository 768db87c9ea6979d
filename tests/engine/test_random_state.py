"""The random state of a rank: what is drawn after it is restored is what was drawn after it was saved."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_orz.config import ParallelConfig


def draw() -> list[Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        of_megatron = torch.rand(3).tolist()
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(3).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        of_megatron,
    ]


@pytest.mark.parametrize("num_draws", [0, 1, 2], ids=["fresh", "half a pair of gaussians", "between pairs"])
def test_every_generator_goes_on(tmp_path: Path, num_draws: int) -> None:
    from megatron_orz.engine.parallel import open_mesh
    from megatron_orz.engine.random_state import RandomState

    with open_mesh(ParallelConfig(), seed=3):
        for _ in range(num_draws):
            draw()
        pending = RandomState(rank=2).save_state(tmp_path, copy=True)
        expected = [draw(), draw()]
        assert pending.write() == [tmp_path / "rank-00002.safetensors"]
        assert [draw(), draw()] != expected
        RandomState(rank=2).load_state(tmp_path)
        assert [draw(), draw()] == expected


def test_a_rank_that_was_not_there_keeps_its_own_state_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron_orz.engine.random_state import RandomState

    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        RandomState(rank=1).load_state(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert "no random state for rank 1" in caplog.text
