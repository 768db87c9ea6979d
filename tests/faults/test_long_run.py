"""A long run holds no more at its end than after its warm-up."""

from __future__ import annotations

import pytest

from tests.faults.long_run import Sample, growth, run_and_sample


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_hundred_steps_hold_no_more_than_a_hundred() -> None:
    samples = run_and_sample(500)
    assert samples[-1].step >= 490
    memory = growth(samples, "memory_mib")
    assert memory[1] - memory[0] < 8, memory
    for name in ("files", "threads", "processes", "shm_mib"):
        second, fourth = growth(samples, name)
        assert fourth <= second + 1, name
    disk = growth(samples, "disk_mib")
    assert disk[1] <= 1.1 * disk[0], "checkpoints pile up"


def test_growth_is_seen() -> None:
    def leaking(step: int) -> Sample:
        return Sample(step, 100 + 0.1 * step, 20, 5, 1, 0.0, 2.0, 0.001 * step)

    second, fourth = growth([leaking(step) for step in range(500)], "memory_mib")
    assert fourth - second == pytest.approx(25, abs=1)
