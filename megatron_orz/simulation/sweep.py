"""Which layout is best, how much each way to run a step gains, and what sync and stragglers cost it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_orz.simulation.course import Course, Setting, simulate
from megatron_orz.simulation.profile import Profile

FIRST_SPLITS = 8
"""Splits tried at first; then those between the best and its neighbours."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to run a step."""

    name: str
    colocated: bool = False
    max_staleness: int = 0
    swaps_within_responses: bool = False
    oversampling: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds a step would be shorter without what costs them, everything else being the same."""

    sync_s: float
    """Without the time of weight updates."""
    stragglers_s: float
    """If every response had the mean length."""
    spread_s: float
    """If every server and every training step were as fast as the mean."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A mode on a number of GPUs, at its best split."""

    mode: Mode
    course: Course
    costs: Costs
    tried: Sequence[Course]
    """One for every split, by the trainer's GPUs."""


Simulate = Callable[[Profile, Setting], Course]


def modes(*, max_staleness: Sequence[int], oversampling: float, colocated: bool) -> list[Mode]:
    """What is compared. Raises ValueError where nothing is."""
    found = [Mode(name="colocated", colocated=True)] if colocated else []
    for staleness in sorted(set(max_staleness)):
        name = {0: "synchronous", 1: "one step ahead"}.get(staleness, f"{staleness} steps ahead")
        found.append(Mode(name=name, max_staleness=staleness))
        if staleness > 1:  # with fewer, nothing is under way as an update begins
            found.append(Mode(name=f"{name}, swapping", max_staleness=staleness, swaps_within_responses=True))
    if oversampling:
        found.append(Mode(name=f"over-sampled {oversampling:.0%}", oversampling=oversampling))
    if not found:
        raise ValueError("no mode is left to simulate; give a max_staleness")
    return found


def best_outcome(
    profile: Profile, mode: Mode, base: Setting, *, gpus: int, trainer_gpus: int | None, num_steps: int, seed: int
) -> Outcome:
    """The mode at the split of the GPUs with the shortest step, or at the one that `trainer_gpus` names.

    base: prompts and responses of a step. Raises ValueError where GPUs cannot be split.
    """

    def run(profile: Profile, setting: Setting) -> Course:
        return simulate(profile, setting, num_steps=num_steps, seed=seed)

    def setting_of(trainer: int) -> Setting:
        return replace(
            base,
            trainer_gpus=trainer,
            server_gpus=gpus if mode.colocated else gpus - trainer,
            colocated=mode.colocated,
            max_staleness=mode.max_staleness,
            swaps_within_responses=mode.swaps_within_responses,
            oversampling=mode.oversampling,
        )

    tried: dict[int, Course] = {}

    def try_splits(splits: Sequence[int]) -> int:
        for trainer in splits:
            if trainer not in tried:
                tried[trainer] = run(profile, setting_of(trainer))
        return min(tried, key=lambda trainer: tried[trainer].step_s)

    if mode.colocated:
        best = try_splits([gpus])
    elif trainer_gpus is not None:
        best = try_splits([trainer_gpus])
    else:
        possible = possible_splits(profile, gpus)
        best = try_splits(first_splits(possible))
        while between := splits_between(possible, sorted(tried), best):
            best = try_splits(between)
    chosen = tried[best]
    return Outcome(
        mode=mode, course=chosen, costs=costs(profile, chosen, run), tried=[tried[split] for split in sorted(tried)]
    )


def costs(profile: Profile, course: Course, run: Simulate) -> Costs:
    """What the course would gain without each of the three."""

    def gain(other: Profile) -> float:
        return course.step_s - run(other, course.setting).step_s

    return Costs(
        sync_s=gain(replace(profile, sync_s=0.0)),
        stragglers_s=gain(profile.with_equal_lengths()),
        spread_s=gain(profile.with_equal_speeds()),
    )


def possible_splits(profile: Profile, gpus: int) -> list[int]:
    """Numbers of trainer GPUs that leave whole replicas and whole servers. Raises ValueError where there are none."""
    possible = [
        trainer
        for trainer in range(profile.gpus_per_replica, gpus, profile.gpus_per_replica)
        if (gpus - trainer) % profile.gpus_per_server == 0
    ]
    if not possible:
        raise ValueError(
            f"{gpus} GPUs cannot be split into replicas of {profile.gpus_per_replica} and servers of "
            f"{profile.gpus_per_server}; choose more"
        )
    return possible


def first_splits(possible: Sequence[int]) -> list[int]:
    """Some of them, evenly spread."""
    last = len(possible) - 1
    return sorted({possible[round(last * place / (FIRST_SPLITS - 1))] for place in range(FIRST_SPLITS)})


def splits_between(possible: Sequence[int], tried: Sequence[int], best: int) -> list[int]:
    """Those halfway from the best one to its neighbours among those tried, in order; none where nothing is between."""
    place, centre = tried.index(best), possible.index(best)
    neighbours = [possible.index(tried[index]) for index in (place - 1, place + 1) if 0 <= index < len(tried)]
    return [possible[(centre + other) // 2] for other in neighbours if abs(centre - other) > 1]
