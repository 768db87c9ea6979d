"""Simulated runs against what can be calculated: no noise, one server, a trainer that takes no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_orz.simulation.course import _Loop, simulate, training_seconds
from megatron_orz.simulation.profile import Decoding, Training
from tests.simulation.profiles import small_profile, small_setting

GENERATE_S, TRAIN_S, SYNC_S = 60.0, 17.4, 3.0
SLOW_TRAINING = Training(
    infer_s=0.1, critic_s=0.2, policy_s=0.3, update_s=1.0, num_critic_updates=2, num_policy_updates=1
)
SLOW_TRAIN_S = 240 * 0.6 + 3.0


def test_a_synchronous_step_is_the_sum_of_its_parts() -> None:
    course = simulate(small_profile(), small_setting())
    assert course.step_s == pytest.approx(SYNC_S + GENERATE_S + TRAIN_S)
    assert (course.sync_s, course.wait_s, course.train_s) == pytest.approx((SYNC_S, GENERATE_S, TRAIN_S))
    assert course.trainer_idle == pytest.approx(GENERATE_S / course.step_s)
    assert course.fleet_idle == pytest.approx(TRAIN_S / course.step_s)
    assert course.gpu_idle == pytest.approx((GENERATE_S + TRAIN_S) / 2 / course.step_s)
    assert course.staleness == 0
    assert course.tokens_per_s_per_gpu == pytest.approx(160 / course.step_s / 2)


@pytest.mark.parametrize("max_staleness", [1, 2, 5])
@pytest.mark.parametrize(("training", "train_s"), [(None, TRAIN_S), (SLOW_TRAINING, SLOW_TRAIN_S)])
def test_ahead_a_step_is_its_longer_half(max_staleness: int, training: Training | None, train_s: float) -> None:
    """Generation or training, whichever takes longer, and the update, in which both stand still."""
    profile = small_profile(training=training) if training else small_profile()
    course = simulate(profile, small_setting(max_staleness=max_staleness))
    if max_staleness == 1 or train_s > GENERATE_S:
        assert course.step_s == pytest.approx(SYNC_S + max(GENERATE_S, train_s))
    if train_s > GENERATE_S:
        assert course.trainer_idle == pytest.approx(0.0, abs=1e-9)
        assert course.staleness == max_staleness


def test_no_server_is_faster_than_all_its_responses_together() -> None:
    """Several batches share the cost of an iteration, but not that of a response: 160 tokens take 40 s at least."""
    course = simulate(small_profile(), small_setting(max_staleness=5, swaps_within_responses=True))
    assert SYNC_S + 160 * 0.25 < course.step_s < SYNC_S + GENERATE_S


@pytest.mark.parametrize("max_staleness", [2, 5])
def test_updates_that_wait_for_all_responses_make_no_use_of_more_than_a_step(max_staleness: int) -> None:
    """Whatever was asked is under way, so that each update waits for the batch asked last."""
    course = simulate(small_profile(), small_setting(max_staleness=max_staleness))
    assert course.step_s == pytest.approx(SYNC_S + GENERATE_S)
    assert course.wait_s == pytest.approx(GENERATE_S - TRAIN_S)


def test_what_waits_in_the_trainer_is_not_waited_for() -> None:
    """Of 1024 prompts of 4 responses, half are asked of the server at a time: an update finds half of a batch there."""
    nothing = Training(infer_s=0, critic_s=0, policy_s=0, update_s=0, num_critic_updates=2, num_policy_updates=1)
    profile = small_profile(
        decoding=Decoding(iteration_s=0.0, response_s=0.01, max_running=4096), training=nothing, max_pack_tokens=60000
    )
    setting = small_setting(num_prompts=1024, num_responses=4, max_staleness=2)
    course = simulate(profile, setting, num_steps=4)
    assert course.step_s == pytest.approx(SYNC_S + 4096 * 10 * 0.01)
    assert course.staleness == pytest.approx(1.5), "half of a batch was asked before the update, half after it"


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_work_is_conserved(max_staleness: int) -> None:
    """Where only responses cost time, a server that is not idle decodes 4 tokens a second, whatever runs on it."""
    lengths = [[1, 40], [7, 3], [25, 25, 2]]
    profile = small_profile(
        groups=lengths,
        max_pack_tokens=500,
        decoding=Decoding(iteration_s=0.0, response_s=0.25, max_running=5),
        training=SLOW_TRAINING,
    )
    setting = small_setting(server_gpus=2, max_staleness=max_staleness)
    course = simulate(profile, setting, num_steps=200)
    busy = (1 - course.fleet_idle) * course.step_s - course.sync_s
    trained = course.tokens_per_s_per_gpu * setting.gpus * course.step_s
    # Batches under way at either end make the difference: a few of 200.
    assert 2 * busy * 4 == pytest.approx(trained, rel=0.03)


def test_a_trainer_without_work_waits_for_servers_alone() -> None:
    nothing = Training(infer_s=0, critic_s=0, policy_s=0, update_s=0, num_critic_updates=2, num_policy_updates=1)
    for max_staleness in (0, 1):
        course = simulate(small_profile(training=nothing), small_setting(max_staleness=max_staleness))
        assert course.step_s == pytest.approx(SYNC_S + GENERATE_S)
        assert course.fleet_idle == pytest.approx(0.0, abs=1e-9)


def test_many_servers_leave_the_longest_response_and_the_trainer() -> None:
    profile = small_profile(decoding=Decoding(iteration_s=2.0, response_s=0.0, max_running=64))
    course = simulate(profile, small_setting(server_gpus=64))
    assert course.step_s == pytest.approx(SYNC_S + 10 * 2.0 + TRAIN_S)


def test_colocated_turns_add_up_and_use_all_gpus() -> None:
    """Two GPUs: 8 responses on each server, half the tokens on each replica, two changes of turns."""
    course = simulate(small_profile(), small_setting(trainer_gpus=2, server_gpus=2, colocated=True))
    generate_s, train_s = 10 * (2 + 8 * 0.25), 120 * 0.06 + 3.0
    assert course.step_s == pytest.approx(SYNC_S + 2 * 0.5 + generate_s + train_s)
    assert course.gpu_idle == pytest.approx(0.0, abs=1e-9)
    assert course.setting.gpus == 2


def test_oversampling_does_without_the_slowest_prompts() -> None:
    """Only iterations take time: of 6 prompts asked, a step waits for the fourth shortest response."""
    profile = small_profile(
        groups=[[5], [10], [20], [40]], decoding=Decoding(iteration_s=1.0, response_s=0.0, max_running=64)
    )
    course = simulate(profile, small_setting(num_prompts=4, num_responses=1, oversampling=0.5), num_steps=10)
    drawn = [profile.draw_groups(6, 1, np.random.default_rng([0, step, *b"lengths"])) for step in range(2, 12)]
    fourth = [sorted(length for (length,) in groups)[3] for groups in drawn]
    assert course.wait_s == pytest.approx(sum(fourth) / 10)
    assert len(set(fourth)) > 1


def test_replicas_wait_for_the_one_with_most_tokens() -> None:
    profile = small_profile()
    one = training_seconds(profile, [50, 10], num_replicas=1)
    two = training_seconds(profile, [50, 10], num_replicas=2)
    assert one == pytest.approx(60 * 0.06 + 3)
    # The packs of the two lie in different mini-batches of the critic, and in the same one of the policy.
    assert two == pytest.approx(50 * 0.01 + (50 + 10) * 0.02 + 50 * 0.03 + 3)
    assert training_seconds(replace(profile, gpus_per_replica=4), [50, 10], num_replicas=1) == pytest.approx(
        60 * 0.06 / 4 + 3
    )


def test_what_grading_takes_is_counted_for_every_rollout() -> None:
    course = simulate(small_profile(rollout_s=0.125), small_setting())
    assert course.train_s == pytest.approx(TRAIN_S + 16 * 0.125)


def test_equal_seeds_give_equal_steps_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = small_profile(groups=[[3, 9], [1, 30]], max_pack_tokens=100, trainer_spread=[0.9, 1.1])
    assert simulate(profile, small_setting(), seed=1) == simulate(profile, small_setting(), seed=1)

    taken: list[float] = []
    train_s = _Loop._train_s
    monkeypatch.setattr(_Loop, "_train_s", lambda *step: taken.append(train_s(*step)) or taken[-1])

    def times(*, num_steps: int, seed: int) -> list[float]:
        """What training takes in each step, those in front included."""
        taken.clear()
        simulate(profile, small_setting(), seed=seed, num_steps=num_steps)
        return taken.copy()

    first = times(num_steps=8, seed=1)
    assert len(set(first)) > 1
    assert times(num_steps=9, seed=1)[:-1] == first
    assert times(num_steps=8, seed=2) != first


def test_slow_servers_and_steps_take_their_share() -> None:
    course = simulate(small_profile(trainer_spread=[2.0], server_spread=[1.5]), small_setting())
    assert course.step_s == pytest.approx(SYNC_S + 1.5 * GENERATE_S + 2 * TRAIN_S)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer_gpus": 3}, "3 GPUs of the trainer are no multiple of the 2 of a replica"),
        ({"server_gpus": 0}, "0 GPUs of the fleet"),
        ({"num_prompts": 0}, "set at least 1"),
        ({"max_staleness": -1}, "negative"),
        ({"max_staleness": 1, "oversampling": 0.5}, "neither combined"),
        ({"max_staleness": 1, "colocated": True}, "neither combined"),
        ({"num_prompts": 1, "num_responses": 1}, "1 rollouts has 2 updates"),
    ],
)
def test_settings_that_make_no_run_are_refused(changes: dict[str, Any], message: str) -> None:
    setting = replace(small_setting(trainer_gpus=2), **changes)
    with pytest.raises(ValueError, match=message):
        simulate(small_profile(gpus_per_replica=2), setting)


def test_profiles_that_say_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="a response without tokens"):
        small_profile(groups=[[0]])
    with pytest.raises(ValueError, match="packs of 60"):
        small_profile(groups=[[55]])
    with pytest.raises(ValueError, match="does not say where sync_s is from"):
        replace(small_profile(), sources={name: "" for name in small_profile().sources if name != "sync_s"})
