"""A run that is killed at any instant and started again is the run that was never killed: rows, prompts and weights."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.tiny_run import NUM_STEPS
from tests.faults.zygote import NEVER, POINTS, End, Plan, Zygote, random_plan


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running
    print(f"\n{running.num_kills} kills")


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: everything but times."""

    rows: list[dict[str, Any]]
    scalars: dict[str, list[tuple[int, float]]]
    weights: bytes
    prompts: dict[int, list[list[int]]]
    """By seed: the prompts of every call that began, evaluations included."""


def outcome_of(place: Path) -> Outcome:
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [without_times(json.loads(line)) for line in lines]
    events = EventAccumulator(str(place / "run" / "tensorboard")).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not is_time(tag)
    }
    prompts: dict[int, list[list[int]]] = {}
    for line in (place / "trace-0.jsonl").read_text().splitlines():
        seed, ids = json.loads(line)
        prompts.setdefault(seed, []).append(ids)
    return Outcome(rows, scalars, (place / "run" / "final" / "model.safetensors").read_bytes(), prompts)


def is_time(name: str) -> bool:
    return name.startswith(("time/", "perf/", "memory/")) or name == "tokens_per_s"


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not is_time(name)}


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert [row["step"] for row in found.rows] == list(range(NUM_STEPS + 1)), "a gap or a duplicate"
    assert found.rows == expected.rows
    assert repr(found.scalars) == repr(expected.scalars)  # as text: nan is not equal to itself
    assert found.weights == expected.weights
    for seed, calls in found.prompts.items():
        assert all(ids in expected.prompts[seed] for ids in calls), "another prompt than at the first try"
    assert found.prompts.keys() == expected.prompts.keys()


@pytest.fixture(scope="module")
def expected(recipe: Path, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that nothing interrupts."""
    place = tmp_path_factory.mktemp("expected")
    end = zygote.run(recipe, place)
    assert end.exit_codes == [0], end.said
    outcome = outcome_of(place)
    assert len({row["reward/mean"] for row in outcome.rows[:-1]}) > 1, "the rewards do not tell steps apart"
    assert any(row["policy/grad_norm"] > 0 for row in outcome.rows[:-1])
    return outcome


def finish(zygote: Zygote, recipe: Path, place: Path, **options: Any) -> End:
    end = zygote.run(recipe, place, NEVER, **options)
    assert set(end.exit_codes) == {0}, end.said
    return end


def kill_and_go_on(
    zygote: Zygote, recipe: Path, place: Path, plans: Sequence[Plan], **options: Any
) -> tuple[int, Outcome]:
    """Starts the same command again after each kill, and at last without one. Returns the number of kills."""
    num_kills = 0
    for plan in plans:
        end = zygote.run(recipe, place, plan, **options)
        num_kills += end.was_killed
        assert end.was_killed or set(end.exit_codes) == {0}, end.said
    finish(zygote, recipe, place, **options)
    return num_kills, outcome_of(place)


@pytest.mark.parametrize(
    "points",
    [
        ("sync:end", "generate:start", "critic:start", "row:end"),
        ("policy:end", "snapshot:end", "write:start", "describe:end"),
        ("manifest:end", "rename:end", "latest:start", "remove:start"),
    ],
    ids=" ".join,
)
def test_a_dozen_kills_leave_no_trace(
    recipe: Path, zygote: Zygote, expected: Outcome, tmp_path: Path, points: tuple[str, ...]
) -> None:
    # The second time: in a later step than the one that the run goes on with.
    num_kills, outcome = kill_and_go_on(zygote, recipe, tmp_path, [Plan(point, 2) for point in points])
    assert num_kills == len(points)
    assert_same(outcome, expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_kills_at_every_point_leave_no_trace(
    recipe: Path, zygote: Zygote, expected: Outcome, tmp_path: Path, point: str
) -> None:
    """In a run that begins, twice in the first step after a checkpoint, and in a later one."""
    is_late = point.startswith(("restore", "final"))
    plans = [] if is_late else [Plan(point, 1)]
    plans += [Plan("commit:end", 1), Plan(point, 1), Plan(point, 1), Plan(point, 2)]
    num_kills, outcome = kill_and_go_on(zygote, recipe, tmp_path, plans)
    assert num_kills >= 3
    assert_same(outcome, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kills_at_any_moment_leave_no_trace(
    recipe: Path, zygote: Zygote, expected: Outcome, tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    plans = [random_plan(generator, 3.0, 1) for _ in range(6)]
    _, outcome = kill_and_go_on(zygote, recipe, tmp_path, plans)
    assert_same(outcome, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--parallel.tp 2", "--parallel.pp 2", "--parallel.tp 1"])
def test_kills_of_one_rank_or_both_leave_no_trace(recipe: Path, zygote: Zygote, tmp_path: Path, layout: str) -> None:
    options = {"arguments": layout.split(), "world_size": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(zygote, recipe, whole, **options)
    generator = random.Random(layout)
    points = ["generate:start", "policy:start", "update:end", "snapshot:end", "write:end", "step-end:start"]
    plans = [Plan(point, 2, rank=generator.randrange(2)) for point in points]
    plans += [random_plan(generator, 6.0, 2) for _ in range(6)]
    num_kills, outcome = kill_and_go_on(zygote, recipe, killed, plans, **options)
    assert num_kills >= len(points)
    assert_same(outcome, outcome_of(whole))


@pytest.mark.slow
def test_there_were_two_hundred_kills(zygote: Zygote) -> None:
    assert zygote.num_kills >= 200


def test_a_killed_verifier_process_is_replaced_and_no_reward_changes(
    recipe: Path, zygote: Zygote, expected: Outcome, tmp_path: Path
) -> None:
    end = zygote.run(recipe, tmp_path, Plan("verifier", 2))
    assert end.exit_codes == [0], end.said
    assert "verifier process killed" in end.said
    assert_same(outcome_of(tmp_path), expected)


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGUSR1", "SIGTERM"]
)
def test_a_signal_ends_the_step_with_a_checkpoint_and_the_exit_code_for_requeueing(
    recipe: Path, zygote: Zygote, expected: Outcome, tmp_path: Path, number: signal.Signals
) -> None:
    end = zygote.run(recipe, tmp_path, Plan("critic:start", 2, signal=number))
    assert end.exit_codes == [75], end.said
    assert f"{number.name}: stopping at the end of the step, within 60 s" in end.said
    end = finish(zygote, recipe, tmp_path)
    assert "going on from the checkpoint after 2 steps" in end.said
    assert_same(outcome_of(tmp_path), expected)


@pytest.mark.slow
def test_a_step_that_does_not_end_in_time_is_given_up(
    recipe: Path, zygote: Zygote, expected: Outcome, tmp_path: Path
) -> None:
    plan = Plan("generate:start", 4, signal=signal.SIGUSR1, stall_s=60)
    end = zygote.run(recipe, tmp_path, plan, arguments=["--checkpoint.grace-s", "0.1"])
    assert end.exit_codes == [75], end.said
    assert "the step did not end within 0.1 s; the same command goes on from the last checkpoint" in end.said
    assert end.seconds < 60
    end = finish(zygote, recipe, tmp_path)
    assert "going on from the checkpoint after 2 steps" in end.said
    assert_same(outcome_of(tmp_path), expected)
