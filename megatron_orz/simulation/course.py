"""The course of a run in simulated time: the loop of `ppo.py` with nothing but its durations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import fmean

import numpy as np
import simpy

from megatron_orz.data.packing import plan_packs, split
from megatron_orz.simulation.profile import Profile
from megatron_orz.simulation.servers import Batch, SimulatedFleet

MAX_ROLLOUTS_IN_FLIGHT = 2048
"""Default of fleet.max_rollouts_in_flight."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a run is laid out."""

    trainer_gpus: int
    server_gpus: int
    """Equal to `trainer_gpus` where they are the same ones."""
    num_prompts: int
    num_responses: int
    colocated: bool = False
    max_staleness: int = 0
    """Versions that rollouts may be behind: as many batches are asked ahead of the trainer."""
    swaps_within_responses: bool = False
    """Updates let what is under way go on; otherwise they wait for it."""
    oversampling: float = 0.0
    """Share of prompts asked in addition; a step goes on without those answered last."""

    @property
    def gpus(self) -> int:
        return self.trainer_gpus if self.colocated else self.trainer_gpus + self.server_gpus

    def check(self, profile: Profile) -> None:
        """Raises ValueError where the GPUs make no whole servers or replicas, or options exclude each other."""
        for name, gpus, part, size in (
            ("trainer", self.trainer_gpus, "replica of the models", profile.gpus_per_replica),
            ("fleet", self.server_gpus, "server", profile.gpus_per_server),
        ):
            if gpus < size or gpus % size:
                raise ValueError(f"{gpus} GPUs of the {name} are no multiple of the {size} of a {part}; choose others")
        if self.num_prompts < 1 or self.num_responses < 1:
            raise ValueError(
                f"{self.num_prompts} prompts of {self.num_responses} responses are no step; set at least 1"
            )
        if self.max_staleness < 0 or self.oversampling < 0:
            raise ValueError(
                f"max_staleness {self.max_staleness} or oversampling {self.oversampling} is negative; 0 turns it off"
            )
        if self.max_staleness and (self.colocated or self.oversampling):
            raise ValueError(
                f"max_staleness {self.max_staleness} is neither combined with a colocated fleet nor with oversampling"
            )
        num_updates = max(profile.training.num_critic_updates, profile.training.num_policy_updates)
        if self.num_prompts * self.num_responses < num_updates:
            raise ValueError(
                f"a step of {self.num_prompts * self.num_responses} rollouts has {num_updates} updates; draw more"
            )


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a simulated run took, per step and without its first steps."""

    setting: Setting
    step_s: float
    train_s: float
    wait_s: float
    """The trainer waited for responses."""
    sync_s: float
    trainer_idle: float
    """Share of the time in which the trainer neither trains nor sends weights."""
    fleet_idle: float
    """Share of the servers' time in which they have nothing to decode."""
    gpu_idle: float
    """Share of all GPUs' time in which they neither train, send nor decode."""
    staleness: float
    """Versions that responses were behind when their request was sent, on average."""
    tokens_per_s_per_gpu: float
    """Response tokens trained on."""


def simulate(profile: Profile, setting: Setting, *, num_steps: int = 8, seed: int = 0) -> Course:
    """Runs `num_steps` steps, and as many more in front as it takes until batches come at a steady pace.

    Two settings with one seed see the same responses, step for step. Raises ValueError for what makes no run.
    """
    setting.check(profile)
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} leaves nothing to measure; set at least 1")
    env = simpy.Environment()
    loop = _Loop(env, profile, setting, num_steps=num_steps, num_before=2 + setting.max_staleness, seed=seed)
    env.run(until=env.process(loop.run()))
    return loop.course()


class _Loop:
    def __init__(
        self, env: simpy.Environment, profile: Profile, setting: Setting, *, num_steps: int, num_before: int, seed: int
    ) -> None:
        self._env = env
        self._profile = profile
        self._setting = setting
        self._num_before = num_before
        self._last = num_before + num_steps
        self._seed = seed
        num_servers = setting.server_gpus // profile.gpus_per_server
        in_flight = max(MAX_ROLLOUTS_IN_FLIGHT, setting.num_responses)
        self._fleet = SimulatedFleet(env, profile.decoding, num_servers=num_servers, max_rollouts_in_flight=in_flight)
        self._asked: dict[int, Batch] = {}
        self._starts: list[float] = []
        self._busy_s: list[float] = []
        self._spent: list[tuple[float, float, float]] = []
        """(training, waiting, sync) seconds of every step."""
        self._lags: list[float] = []
        self._tokens: list[int] = []

    def run(self) -> simpy.events.ProcessGenerator:
        """The loop: weights, rollouts, training."""
        setting, env = self._setting, self._env
        for step in range(self._last):
            start = env.now
            self._starts.append(start)
            self._busy_s.append(self._fleet.busy_s())
            if step in self._asked and not setting.swaps_within_responses:
                yield self._asked[step].is_answered
                yield from self._fleet.drain()
            waited = env.now - start
            before = env.now
            sync_s = self._profile.sync_s + (2 * self._profile.switch_s if setting.colocated else 0.0)
            yield from self._fleet.update(step, sync_s, self._slownesses(step))
            synced = env.now - before
            if step not in self._asked:
                self._ask(step)
            before = env.now
            yield self._asked[step].is_answered
            waited += env.now - before
            if setting.oversampling:
                self._fleet.abort()
            for ahead in range(step + 1, step + 1 + setting.max_staleness):
                if ahead not in self._asked:
                    self._ask(ahead)
            before = env.now
            answers = self._asked[step].answers
            yield env.timeout(self._train_s(step, [request.lengths for request in answers]))
            self._spent.append((env.now - before, waited, synced))
            self._lags.append(fmean(step - request.version for request in answers))
            self._tokens.append(sum(sum(request.lengths) for request in answers))
        self._starts.append(env.now)
        self._busy_s.append(self._fleet.busy_s())

    def course(self) -> Course:
        """What the steps after the first few took."""
        setting, first = self._setting, self._num_before
        times = [end - start for start, end in pairwise(self._starts[first:])]
        total = sum(times)
        train_s, wait_s, sync_s = (fmean(column) for column in zip(*self._spent[first:], strict=True))
        step_s = fmean(times)
        num_servers = len(self._fleet.servers)
        fleet_busy = (self._busy_s[-1] - self._busy_s[first]) / num_servers / total
        trainer_busy = (train_s + sync_s) / step_s
        if setting.colocated:
            busy_gpus = setting.gpus * (fleet_busy + trainer_busy)
        else:
            fleet_gpus_busy = fleet_busy + sync_s / step_s
            busy_gpus = setting.server_gpus * fleet_gpus_busy + setting.trainer_gpus * trainer_busy
        return Course(
            setting=setting,
            step_s=step_s,
            train_s=train_s,
            wait_s=wait_s,
            sync_s=sync_s,
            trainer_idle=1 - trainer_busy,
            fleet_idle=1 - fleet_busy - sync_s / step_s,
            gpu_idle=1 - busy_gpus / setting.gpus,
            staleness=fmean(self._lags[first:]),
            tokens_per_s_per_gpu=sum(self._tokens[first:]) / total / setting.gpus,
        )

    def _ask(self, step: int) -> None:
        setting = self._setting
        num_groups = math.ceil(setting.num_prompts * (1 + setting.oversampling))
        groups = self._profile.draw_groups(num_groups, setting.num_responses, self._rng("lengths", step))
        self._asked[step] = self._fleet.ask(groups, num_needed=setting.num_prompts)

    def _train_s(self, step: int, groups: Sequence[Sequence[int]]) -> float:
        profile, setting = self._profile, self._setting
        lengths = tuple(round(profile.prompt_tokens) + length - 1 for group in groups for length in group)
        slowness = self._rng("trainer", step).choice(np.asarray(profile.trainer_spread))
        seconds = training_seconds(profile, lengths, num_replicas=setting.trainer_gpus // profile.gpus_per_replica)
        return seconds * float(slowness) + profile.rollout_s * len(lengths)

    def _slownesses(self, step: int) -> list[float]:
        spread = np.asarray(self._profile.server_spread)
        return self._rng("servers", step).choice(spread, len(self._fleet.servers)).tolist()

    def _rng(self, purpose: str, step: int) -> np.random.Generator:
        """A stream of its own for every purpose and step, so that settings differ in nothing else."""
        return np.random.default_rng([self._seed, step, *purpose.encode()])


def training_seconds(profile: Profile, lengths: Sequence[int], *, num_replicas: int) -> float:
    """Of a step's inference and updates on sequences of these lengths.

    Replicas wait for each other at every optimizer step: each mini-batch takes as long as on the replica with most
    tokens in it, in the packs that the run itself would make of them.
    """
    training = profile.training
    counts = (1, training.num_critic_updates, training.num_policy_updates)
    infer, critic, policy = critical_tokens(tuple(lengths), profile.max_pack_tokens, num_replicas, counts)
    gpu_s = training.infer_s * infer + training.critic_s * critic + training.policy_s * policy
    num_updates = training.num_critic_updates + training.num_policy_updates
    return gpu_s / profile.gpus_per_replica + num_updates * training.update_s


@lru_cache(maxsize=256)
def critical_tokens(
    lengths: tuple[int, ...], max_pack_tokens: int, num_replicas: int, counts: tuple[int, ...]
) -> list[int]:
    """For each number of mini-batches in `counts`, the tokens of the fullest replica, summed over the mini-batches."""
    plan = plan_packs(lengths, max_pack_tokens=max_pack_tokens, dp_size=num_replicas, min_packs=max(counts))
    tokens = [[sum(lengths[index] for index in pack) for pack in packs] for packs in plan]
    critical = []
    for count in counts:
        parts = [[sum(part) for part in split(packs, count)] if count else [] for packs in tokens]
        critical.append(sum(max(of_replicas) for of_replicas in zip(*parts, strict=True)))
    return critical
