"""The memory of phases and of models, with memory that is really taken and given back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_orz.engine import high_water
from megatron_orz.memory import GIB, MemoryMeter
from megatron_orz.ranks import Ranks
from tests.launch import run_ranks

MIB = 2**20
CPU = torch.device("cpu")
# The kernel counts pages per thread before it adds them up, and joins small ones to huge ones when it likes; the
# interpreter takes some for itself.
SLACK = 16 * MIB


class Model:
    """256 MiB of weights at most, and no gradients."""

    def __init__(self, num_mib: int) -> None:
        self.num_mib = num_mib

    def resident_bytes(self) -> dict[str, int]:
        return {"weights": self.num_mib * MIB, "gradients": 0, "main weights": 2 * self.num_mib * MIB}


def take(num_mib: int, device: torch.device = CPU) -> torch.Tensor:
    """Memory that is written to, so that it exists."""
    return torch.ones(num_mib * MIB, dtype=torch.uint8, device=device)


def check_phases(device: torch.device) -> None:
    """A phase that keeps 64 MiB and needs 128 more for a while, a quiet one, and one that gives the 64 back."""
    gc.collect()
    meter = MemoryMeter({"policy": Model(16)}, ranks=Ranks(), device=device)
    start = high_water.held_bytes(device)
    kept = take(64, device)
    for _ in range(2):
        take(128, device)
    meter.on_span("policy", 0.0, 1.0)
    meter.on_span("sync", 1.0, 2.0)
    del kept
    meter.on_span("generate", 2.0, 3.0)
    metrics = {name: value * GIB for name, value in meter.metrics().items()}
    near = {name: pytest.approx(value, abs=SLACK) for name, value in {
        "memory/policy_peak_gib": start + 192 * MIB,
        "memory/policy_beyond_gib": 128 * MIB,
        "memory/sync_peak_gib": start + 64 * MIB,
        "memory/sync_beyond_gib": 0,
        "memory/generate_peak_gib": start + 64 * MIB,
        "memory/generate_beyond_gib": 64 * MIB,
    }.items()}  # fmt: skip
    assert metrics.pop("memory/policy_weights_gib") == 16 * MIB
    assert metrics.pop("memory/policy_main_weights_gib") == 32 * MIB
    assert metrics.pop("memory/host_gib") == pytest.approx(high_water.resident_bytes(), abs=SLACK)
    assert metrics == near
    assert meter.metrics().keys() == {
        "memory/host_gib", "memory/policy_weights_gib", "memory/policy_main_weights_gib"
    }  # fmt: skip


@pytest.fixture
def is_cleared() -> Iterator[None]:
    """Nothing of other tests is given back to the kernel meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("is_cleared")
def test_peaks_are_those_of_their_phase_on_a_cpu() -> None:
    check_phases(CPU)


@pytest.mark.gpu
def test_peaks_are_those_of_their_phase_on_a_gpu() -> None:
    check_phases(torch.device("cuda", torch.cuda.current_device()))


def check_ranks() -> None:
    """What one rank of two does: the second takes more, and its model has parts that the first one's lacks."""
    dist.init_process_group("gloo")
    ranks = Ranks()
    meter = MemoryMeter({"critic": Model(100 * ranks.rank)}, ranks=ranks, device=CPU)
    before = ranks.gather(high_water.held_bytes(CPU))
    take(64 + 256 * ranks.rank)
    meter.on_span("critic", 0.0, 1.0)
    metrics = meter.metrics()
    assert metrics["memory/critic_weights_gib"] == 100 * MIB / GIB
    assert metrics["memory/critic_peak_gib"] * GIB == pytest.approx(before[1] + 320 * MIB, abs=2 * SLACK)
    assert ranks.gather(metrics) == [metrics, metrics]
    ranks.close()
    dist.destroy_process_group()


def test_the_rank_with_most_counts_on_all() -> None:
    run_ranks(2, check_ranks)


def test_a_kernel_that_keeps_its_peaks_leaves_them_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(high_water, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    meter = MemoryMeter({"policy": Model(16)}, ranks=Ranks(), device=CPU)
    meter.on_span("policy", 0.0, 1.0)
    assert not any("peak" in name for name in meter.metrics())
    assert "the memory of each phase is not measured" in caplog.text
