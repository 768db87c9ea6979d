"""A checkpoint of the training state: what follows it is what would have followed, in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_orz.algorithms.losses import ClippedValueLoss
from megatron_orz.config import CriticConfig, ModelConfig
from tests.engine import tiny
from tests.engine.layouts import CLIP_EPS, NUM_SEQUENCES, OPTIMIZER, Layout, copy_of, packs_of_rank, policy_loss

pytestmark = pytest.mark.usefixtures("one_thread")

# Every update after the checkpoint is still within the warm-up, so that a lost schedule shows.
LONG_WARMUP = dataclasses.replace(OPTIMIZER, warmup_steps=8)
# Sums of gradients in another order: far below what one wrong moment does to the next update (see the planted faults).
TOLERANCE = 1e-5
SINGLE = Layout()
WAYS = [
    (Layout(dp=2, overlap=True), Layout(tp=2, sp=True)),
]
SLOW_WAYS = [
    (Layout(tp=2, sp=True, distributed=False), Layout(pp=2, chunk_layers=(1, 3))),
    (Layout(dp=2), SINGLE),
    (Layout(pp=2, tied=True), Layout(dp=2, tied=True)),
    (SINGLE, Layout(dp=2)),
    (Layout(cp=2), Layout(pp=2, vpp=2)),
    (Layout(pp=2, vpp=2), Layout(tp=2)),
    (Layout(tp=2, pp=2, sp=True), Layout(dp=4)),
    (Layout(dp=4), Layout(tp=2, pp=2, sp=True)),
    (Layout(dp=3), Layout(dp=2, distributed=False)),
    (Layout(ep=2, dp=2, family="qwen3_moe"), Layout(pp=2, family="qwen3_moe")),
    (Layout(pp=2, family="qwen3_moe"), Layout(ep=2, dp=2, overlap=True, family="qwen3_moe")),
    (Layout(tp=2, tied=True), Layout(pp=2, tied=True)),
]


def run(layout: Layout, model: Path, place: Path, do: Callable[..., dict[str, Any]], output: str) -> None:
    """What one rank does: builds both engines, hands them to `do`, and keeps what it returns as rank 0's."""
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    with open_mesh(layout.parallel, seed=0) as mesh:
        optimizer = dataclasses.replace(LONG_WARMUP, distributed=layout.distributed)
        common: dict[str, Any] = {"path": model, "optimizer": optimizer, "dtype": layout.dtype}
        engines = (
            PolicyEngine(ModelConfig(**common), mesh),
            CriticEngine(CriticConfig(**common), mesh, seed=11),
        )
        packs = packs_of_rank(tiny.random_sequences(NUM_SEQUENCES), layout, mesh.dp_rank)
        results = {engine.name: do(engine, packs, place / engine.name) for engine in engines}
        if mesh.rank == 0:
            torch.save(results, place / output)


def step(engine: Any, packs: Any) -> dict[str, float]:
    metrics: dict[str, float] = engine.step(
        packs, policy_loss if engine.name == "policy" else ClippedValueLoss(CLIP_EPS)
    )
    return metrics


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    return copy_of(engine.hf_weights())


def train_save_and_go_on(engine: Any, packs: Any, directory: Path) -> dict[str, Any]:
    for _ in range(2):
        step(engine, packs)
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    pending = engine.save_state(directory, copy=True)
    # What is written is what was, although training goes on.
    metrics = [step(engine, packs)]
    pending.write()
    summaries: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(summaries, pending.summary)
    if dist.get_rank() == 0:
        pending.finish(summaries)
    dist.barrier()
    return {"metrics": [*metrics, step(engine, packs)], "weights": whole_weights(engine)}


def load_and_go_on(engine: Any, packs: Any, directory: Path) -> dict[str, Any]:
    engine.load_state(directory)
    return {"metrics": [step(engine, packs), step(engine, packs)], "weights": whole_weights(engine)}


def check(place: Path, *, tolerance: float, output: str = "found.pt") -> None:
    expected, found = torch.load(place / "expected.pt"), torch.load(place / output)
    for engine in ("policy", "critic"):
        for before, after in zip(expected[engine]["metrics"], found[engine]["metrics"], strict=True):
            if tolerance == 0:
                assert after == before
            else:
                assert after == pytest.approx(before, rel=10 * tolerance, abs=tolerance)
        for name, weight in expected[engine]["weights"].items():
            difference = float((found[engine]["weights"][name] - weight).abs().max() / weight.abs().max())
            assert difference <= tolerance, (engine, name, difference)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    saved: dict[tuple[str, bool], Path] = {}

    def path_of(layout: Layout) -> Path:
        key = layout.family, layout.tied
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp(layout.family)
            tiny.save_model(saved[key], family=layout.family, tied=layout.tied)
        return saved[key]

    return path_of


def save_with_one_load_with_another(
    launch: Callable[..., None], model: Path, place: Path, first: Layout, second: Layout, tolerance: float
) -> None:
    launch(first.world_size, run, first, model, place, train_save_and_go_on, "expected.pt")
    launch(second.world_size, run, second, model, place, load_and_go_on, "found.pt")
    check(place, tolerance=tolerance)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dtype="bfloat16"),
        pytest.param(Layout(distributed=False), marks=pytest.mark.slow),
        pytest.param(Layout(distributed=False, dtype="bfloat16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_layout_goes_on_to_the_last_bit(
    launch: Callable[..., None], model: Callable[[Layout], Path], tmp_path: Path, layout: Layout
) -> None:
    save_with_one_load_with_another(launch, model(layout), tmp_path, layout, layout, 0)


def test_a_checkpoint_before_the_first_update_holds_moments_of_zero(
    launch: Callable[..., None], model: Callable[[Layout], Path], tmp_path: Path
) -> None:
    launch(1, run, SINGLE, model(SINGLE), tmp_path, save_untrained_and_go_on, "expected.pt")
    launch(1, run, SINGLE, model(SINGLE), tmp_path, load_and_go_on, "found.pt")
    check(tmp_path, tolerance=0)


def save_untrained_and_go_on(engine: Any, packs: Any, directory: Path) -> dict[str, Any]:
    directory.mkdir()
    pending = engine.save_state(directory, copy=False)
    pending.write()
    pending.finish([pending.summary])
    return {"metrics": [step(engine, packs), step(engine, packs)], "weights": whole_weights(engine)}


@pytest.mark.parametrize(
    ("first", "second"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in SLOW_WAYS)], ids=str
)
def test_another_layout_goes_on_alike(
    launch: Callable[..., None], model: Callable[[Layout], Path], tmp_path: Path, first: Layout, second: Layout
) -> None:
    save_with_one_load_with_another(launch, model(first), tmp_path, first, second, TOLERANCE)


def lose_moments(engine: Any) -> None:
    for share in engine._optimizer.shares():
        share.tensors["exp_avg_sq"].mul_(1.01)


def lose_steps(engine: Any) -> None:
    engine._optimizer.restore_counters({**engine._optimizer.counters(), "num_updates": 0})


def lose_schedule(engine: Any) -> None:
    engine._optimizer.restore_counters({**engine._optimizer.counters(), "schedule_steps": 1})


def share_one_step_tensor(engine: Any) -> None:
    for part in engine._optimizer._parts:
        one = next(iter(part.optimizer.state.values()))["step"]
        for state in part.optimizer.state.values():
            state["step"] = one


@pytest.fixture(scope="module")
def saved(model: Callable[[Layout], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a single process has saved its state, and gone on."""
    place = tmp_path_factory.mktemp("saved")
    run(SINGLE, model(SINGLE), place, train_save_and_go_on, "expected.pt")
    return place


def test_a_single_process_goes_on_to_the_last_bit(model: Callable[[Layout], Path], saved: Path) -> None:
    run(SINGLE, model(SINGLE), saved, load_and_go_on, "found.pt")
    check(saved, tolerance=0)


@pytest.mark.parametrize("fault", [lose_moments, lose_steps, lose_schedule, share_one_step_tensor])
def test_a_planted_fault_is_found(model: Callable[[Layout], Path], saved: Path, fault: Callable[[Any], None]) -> None:
    def load_wrongly_and_go_on(engine: Any, packs: Any, directory: Path) -> dict[str, Any]:
        engine.load_state(directory)
        fault(engine)
        return {"metrics": [step(engine, packs), step(engine, packs)], "weights": whole_weights(engine)}

    run(SINGLE, model(SINGLE), saved, load_wrongly_and_go_on, "wrong.pt")
    with pytest.raises(AssertionError):
        check(saved, tolerance=TOLERANCE, output="wrong.pt")
