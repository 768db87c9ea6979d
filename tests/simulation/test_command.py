"""`tools/plan.py simulate`: the best split, what things cost, and what is left behind."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_orz.simulation.command import Arguments, load_profile, run, simulate_all
from megatron_orz.simulation.course import simulate
from megatron_orz.simulation.published import MAX_RESPONSE_TOKENS, MEAN_RESPONSE_TOKENS, NAMES, published_profile
from megatron_orz.simulation.sweep import Mode, best_outcome, first_splits, modes, possible_splits, splits_between
from tests.simulation.profiles import small_profile, small_setting
from tests.simulation.test_measured import ITERATION_S, RESPONSE_S, write_run


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_best_split_is_that_of_trying_all(max_staleness: int) -> None:
    profile = small_profile(gpus_per_replica=2)
    mode, base = Mode(name="", max_staleness=max_staleness), small_setting(trainer_gpus=2)
    outcome = best_outcome(profile, mode, base, gpus=32, trainer_gpus=None, num_steps=2, seed=0)
    every = [
        simulate(
            profile,
            small_setting(trainer_gpus=trainer, server_gpus=32 - trainer, max_staleness=max_staleness),
            num_steps=2,
        ).step_s
        for trainer in range(2, 32, 2)
    ]
    assert outcome.course.step_s == pytest.approx(min(every))
    assert len(outcome.tried) < len(every)


def test_splits_leave_whole_replicas_and_servers() -> None:
    profile = small_profile(gpus_per_replica=4, gpus_per_server=2)
    assert possible_splits(profile, 16) == first_splits([4, 8, 12]) == [4, 8, 12]
    with pytest.raises(ValueError, match="5 GPUs cannot be split into replicas of 4 and servers of 2"):
        possible_splits(profile, 5)
    # 30 - 8 is no multiple of 4, though 8 lies halfway from 2 to 14.
    assert possible_splits(small_profile(gpus_per_replica=2, gpus_per_server=4), 30) == [2, 6, 10, 14, 18, 22, 26]


def test_the_search_halves_the_ways_to_the_neighbours_of_the_best() -> None:
    possible = [2, 6, 10, 14, 18, 22, 26]
    assert splits_between(possible, [2, 14, 26], 14) == [6, 18]
    assert splits_between(possible, [2, 14, 26], 2) == [6]
    assert splits_between(possible, [2, 6, 14, 18, 26], 6) == [10]
    assert splits_between(possible, [6, 10, 14], 10) == []


def test_costs_are_what_a_step_would_be_shorter_by() -> None:
    profile = small_profile(groups=[[2, 38]], max_pack_tokens=100, server_spread=[1.0, 1.5])
    outcome = best_outcome(profile, Mode(name=""), small_setting(), gpus=2, trainer_gpus=1, num_steps=30, seed=0)
    assert outcome.costs.sync_s == pytest.approx(3.0)
    # Equal lengths take 20 iterations instead of 38 for 16 responses, of which equally many tokens remain.
    assert outcome.costs.stragglers_s == pytest.approx(2.0 * 18 * 1.25, rel=0.25)
    assert outcome.costs.spread_s > 0


def test_modes_are_named_and_some_mode_is_needed() -> None:
    names = [mode.name for mode in modes(max_staleness=(1, 0, 3), oversampling=0.25, colocated=True)]
    ahead = ["one step ahead", "3 steps ahead", "3 steps ahead, swapping"]
    assert names == ["colocated", "synchronous", *ahead, "over-sampled 25%"]
    with pytest.raises(ValueError, match="no mode is left"):
        modes(max_staleness=(), oversampling=0.0, colocated=False)


def test_the_files_hold_what_the_tables_show(tmp_path: Path) -> None:
    measured = write_run(tmp_path / "run", num_prompts=4, num_responses=3)
    text = io.StringIO()
    arguments = Arguments((str(measured),), gpus=(2, 4), max_staleness=(0, 1), num_steps=2, output=tmp_path / "plan")
    run(arguments, Console(file=text, width=250))
    written = json.loads((tmp_path / "plan" / "simulation.json").read_text())
    assert [(row["gpus"], row["mode"]["name"]) for row in written["outcomes"]] == [
        (gpus, name) for gpus in (2, 4) for name in ("colocated", "synchronous", "one step ahead", "over-sampled 25%")
    ]
    expected = simulate_all(load_profile([str(measured)]), arguments)
    assert [row["course"]["step_s"] for row in written["outcomes"]] == [
        outcome.course.step_s for of_modes in expected.values() for outcome in of_modes
    ]
    assert f"{written['outcomes'][-1]['course']['step_s']:.1f}" in text.getvalue()
    assert (tmp_path / "plan" / "simulation.png").read_bytes().startswith(b"\x89PNG")
    steps, idle, stragglers = (tmp_path / "plan" / "simulation.md").read_text().split("\n\n")
    ahead = written["outcomes"][-2]["course"]
    assert f" {ahead['step_s']:.0f} s, {ahead['setting']['trainer_gpus']} + " in steps.splitlines()[-1]
    assert f" {ahead['trainer_idle']:.0%}, {ahead['fleet_idle']:.0%} |" in idle.splitlines()[-1]
    assert stragglers.splitlines()[-1].endswith(f" {written['outcomes'][-2]['costs']['stragglers_s']:.1f} s | - |")
    assert "saved generations" in text.getvalue(), "where the numbers are from"


def test_a_run_is_compared_with_its_prediction(tmp_path: Path) -> None:
    known = [
        write_run(tmp_path / "small", num_prompts=2, num_responses=3),
        write_run(tmp_path / "large", num_prompts=16, num_responses=8),
    ]
    text = io.StringIO()
    arguments = Arguments(tuple(map(str, known)), against=(known[1],), num_steps=60, output=tmp_path / "plan")
    run(arguments, Console(file=text, width=250))
    (check,) = json.loads((tmp_path / "plan" / "simulation.json").read_text())["checks"]
    assert check["step_s"] == pytest.approx(check["measured_step_s"], rel=0.05)
    assert "error" in text.getvalue()
    fewer = write_run(tmp_path / "fewer", num_prompts=12, num_responses=8, max_running=1)
    run(replace(arguments, against=(fewer,)), Console(file=text, width=250))
    (check,) = json.loads((tmp_path / "plan" / "simulation.json").read_text())["checks"]
    assert check["wait_s"] == pytest.approx(12 * 8 * 32.5 * (ITERATION_S + RESPONSE_S), rel=0.05), "one by one"


@pytest.mark.parametrize("name", NAMES)
def test_a_published_profile_is_what_it_says(name: str) -> None:
    profile = published_profile(name)
    assert profile.mean_response_tokens == pytest.approx(MEAN_RESPONSE_TOKENS, rel=1e-3)
    assert max(map(max, profile.groups)) == MAX_RESPONSE_TOKENS
    assert min(map(min, profile.groups)) >= 1


def test_the_arithmetic_of_the_recipe_is_that_by_hand() -> None:
    """7.6e9 parameters on an H800: 989 TFLOP/s, 3.35 TB/s, links of 50 GB/s.

    A pass over a token takes 15.2 GFLOP, at 35 % of the peak 43.9 microseconds. An update sends and receives a quarter
    of the gradients, 7.6 GB. Reading 15.2 GB of weights at 80 % of the bandwidth takes 5.67 ms; a response adds 57 kB
    of keys and values for each of 1000 tokens, 21.4 microseconds, and its 15.2 GFLOP at half of the peak, 30.7.
    """
    profile = published_profile("orz-7b-h800")
    training = profile.training
    assert training.infer_s == pytest.approx(43.9e-6, rel=1e-3), "the critic's; the policy's update infers by itself"
    assert (training.critic_s, training.policy_s) == pytest.approx((3 * training.infer_s,) * 2)
    assert training.update_s == pytest.approx(2 * 7.6e9 / 50e9)
    assert (training.num_critic_updates, training.num_policy_updates) == (12, 1)
    assert profile.decoding.iteration_s == pytest.approx(5.67e-3 + 1e-3, rel=1e-3)
    assert profile.decoding.response_s == pytest.approx(21.4e-6 + 30.7e-6, rel=2e-3)


@pytest.mark.parametrize(
    ("profile", "changes", "message"),
    [
        ((), {}, "no profile is given"),
        (("orz-7b-h800",), {"gpus": (1,)}, "leaves none for a trainer and a server"),
        (("orz-7b-h800",), {"oversampling": float("nan")}, "is not a share of prompts"),
        (("orz-8b",), {}, "there is no profile 'orz-8b'; give one of orz-7b-h800"),
        (("orz-7b-h800", "orz-32b-h800"), {}, "orz-7b-h800 is no directory"),
        (("orz-7b-h800",), {"gpus": (4,), "oversampling": 0.0, "colocated": False}, "cannot be split"),
        (("orz-7b-h800",), {"trainer_gpus": 0, "colocated": False}, "0 GPUs of the trainer are no multiple of the 4"),
    ],
)
def test_bad_input_is_one_sentence(profile: tuple[str, ...], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Arguments(profile, **changes), Console(file=io.StringIO()))  # type: ignore[arg-type]
