"""The same config and seed give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_orz.logs import read_metrics
from megatron_orz.rollout.servers import free_port
from tests.recipe import DEADLINE_S, command_line, run_process

pytestmark = pytest.mark.usefixtures("own_place")


def test_a_deterministic_run_repeats_bit_by_bit(home: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    try:
        for run in runs:
            torch.manual_seed(len(str(run)))  # a run does not depend on what went before
            assert command_line(home, "--deterministic", "--run-dir", str(run)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = runs
    assert_same_bits(first, second)


def assert_same_bits(first: Path, second: Path) -> None:
    """The same weights, and the same metrics of every step, except for those that measure time."""
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    rows = [read_metrics(run / "metrics.jsonl") for run in (first, second)]
    measured = [
        [
            {name: x for name, x in row.items() if not name.startswith(("time/", "perf/", "memory/", "tokens_per_s"))}
            for row in of_run
        ]
        for of_run in rows
    ]
    assert len(measured[0]) == 3
    assert measured[0] == measured[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--parallel.tp", "2")])
def test_deterministic_ranks_repeat_bit_by_bit(home: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    for run in runs:
        grid = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = ("--deterministic", "--run-dir", str(run), *layout)
        ranks = [run_process(home, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **grid) for rank in range(2)]
        try:
            said = [rank.communicate(timeout=2 * DEADLINE_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], said
    assert_same_bits(*runs)
