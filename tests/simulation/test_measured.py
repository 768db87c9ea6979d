"""Profiles from run directories: known costs are found again in what they would have taken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_orz.generations import Generation, generations_file, write_generations
from megatron_orz.simulation.course import critical_tokens, simulate
from megatron_orz.simulation.measured import RUNNING_ON_CPU, measured_profile, nonnegative_fit
from megatron_orz.simulation.runs import read_run

ITERATION_S, RESPONSE_S = 0.05, 0.002
INFER_S, CRITIC_S, POLICY_S, UPDATE_S = 1e-3, 2e-3, 3e-3, 0.7
SYNC_S, GRADE_S = 0.4, 0.001
PROMPT_TOKENS = 12


def write_run(run_dir: Path, *, num_prompts: int, num_responses: int, slowness: float = 1.0, **ppo: Any) -> Path:
    """Four steps of a run with one server and one rank, which took what the costs above make of their tokens.

    slowness: of the third step's generation.
    """
    rng = random.Random(num_prompts)
    run_dir.mkdir()
    config = {
        "ppo": {"num_prompts": num_prompts, "num_responses": num_responses, "num_critic_updates": 4}
        | {"num_policy_updates": 1, "advantages": "gae", "max_staleness": 0, "oversampling": 0.0}
        | ppo,
        "fleet": {"kind": "vllm", "urls": [], "num_servers": 1, "server_tp": 1, "colocated": False},
        "parallel": {"tp": 1, "pp": 1, "cp": 1, "num_ranks": None},
        "data": {"max_pack_tokens": 4096},
    }
    (run_dir / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(4):
        lengths = [[rng.randint(5, 60) for _ in range(num_responses)] for _ in range(num_prompts)]
        flat = [length for group in lengths for length in group]
        assert len(flat) <= RUNNING_ON_CPU, "the closed form below knows no waiting"
        sequences = tuple(PROMPT_TOKENS + length - 1 for length in flat)
        infer, critic, policy = critical_tokens(sequences, 4096, 1, (1, 4, 1))
        rows.append(
            {
                "step": step,
                "time/sync_s": SYNC_S,
                "time/evaluate_s": 100.0,
                "time/generate_s": (ITERATION_S * max(flat) + RESPONSE_S * sum(flat)) * (slowness if step == 2 else 1),
                "time/reward_s": GRADE_S * len(flat),
                "time/infer_s": INFER_S * infer,
                "time/critic_s": CRITIC_S * critic + 4 * UPDATE_S,
                "time/policy_s": POLICY_S * policy + UPDATE_S,
            }
        )
        generations = [generation(step, prompt, length) for prompt, group in enumerate(lengths) for length in group]
        assert write_generations(generations, generations_file(run_dir, step), max_mib=10) == 0
    rows[0]["time/critic_s"] += 1000.0  # what is done once falls into the first step
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def generation(step: int, prompt_id: int, num_response_tokens: int) -> Generation:
    return Generation(
        step=step,
        prompt_id=prompt_id,
        source="",
        prompt="",
        response="",
        answer="",
        extracted=None,
        reward=0.0,
        is_correct=False,
        is_formatted=False,
        timed_out=False,
        finish_reason="stop",
        num_prompt_tokens=PROMPT_TOKENS,
        num_response_tokens=num_response_tokens,
        policy_version=step,
        reflection=[],
        repetition=0.0,
        prompt_ids=[],
        response_ids=[],
    )


def test_costs_are_found_again_in_runs_of_two_sizes(tmp_path: Path) -> None:
    small = read_run(write_run(tmp_path / "small", num_prompts=2, num_responses=3))
    large = read_run(write_run(tmp_path / "large", num_prompts=16, num_responses=8))
    profile = measured_profile([small, large])
    decoding, training = profile.decoding, profile.training
    assert (decoding.iteration_s, decoding.response_s) == pytest.approx((ITERATION_S, RESPONSE_S), rel=1e-6)
    assert (training.infer_s, training.critic_s, training.policy_s, training.update_s) == pytest.approx(
        (INFER_S, CRITIC_S, POLICY_S, UPDATE_S), rel=1e-6
    )
    assert (profile.sync_s, profile.rollout_s) == pytest.approx((SYNC_S, GRADE_S))
    assert profile.prompt_tokens == PROMPT_TOKENS
    assert profile.server_spread == pytest.approx([1.0] * 6)
    assert "of several sizes" in profile.sources["decoding"]
    assert len(profile.groups) == 3 * (2 + 16)


def test_a_run_of_another_size_is_predicted(tmp_path: Path) -> None:
    known = [
        read_run(write_run(tmp_path / "small", num_prompts=2, num_responses=3)),
        read_run(write_run(tmp_path / "large", num_prompts=16, num_responses=8)),
    ]
    other = read_run(write_run(tmp_path / "other", num_prompts=10, num_responses=6))
    course = simulate(measured_profile(known), other.setting, num_steps=60)
    # Its three steps and the sixty simulated ones have lengths of one distribution, but not the same.
    assert course.step_s == pytest.approx(other.step_s, rel=0.05)


def test_runs_of_one_size_put_everything_on_the_tokens_and_say_so(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_prompts=16, num_responses=8))
    profile = measured_profile([run])
    assert profile.decoding.iteration_s == profile.training.update_s == 0
    assert "runs of one size do not tell" in profile.sources["decoding"]
    course = simulate(profile, run.setting, num_steps=60)
    assert course.step_s == pytest.approx(run.step_s, rel=0.05)


def test_a_slow_step_is_in_the_spread(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_prompts=16, num_responses=8, slowness=3.0))
    spread = measured_profile([run]).server_spread
    assert sum(spread) / len(spread) == pytest.approx(1.0)
    assert spread[1] / spread[0] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("option", [{"max_staleness": 1}, {"oversampling": 0.25}])
def test_generation_that_was_not_timed_alone_is_refused(tmp_path: Path, option: dict[str, float]) -> None:
    run = read_run(write_run(tmp_path / "run", num_prompts=2, num_responses=3, **option))
    with pytest.raises(ValueError, match="fit on runs without them"):
        measured_profile([run])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_run(tmp_path)
    run = write_run(tmp_path / "run", num_prompts=2, num_responses=3)
    generations_file(run, 2).unlink()
    with pytest.raises(ValueError, match=r"step-000002\.parquet is missing"):
        read_run(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"fleet": config["fleet"] | {"kind": "local"}}))
    with pytest.raises(ValueError, match="has no servers"):
        read_run(run)
    (run / "config.json").write_text(json.dumps({"ppo": {}}))
    with pytest.raises(ValueError, match="is not the config of a run"):
        read_run(run)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_meets_the_conditions_of_a_constrained_minimum(seed: int) -> None:
    """Karush-Kuhn-Tucker: no cost is negative, the gradient is 0 where a cost is positive and not below 0 elsewhere."""
    rng = np.random.default_rng(seed)
    counts, seconds = rng.normal(1.0, 1.0, (20, 4)), rng.uniform(0.5, 2.0, 20)
    costs = nonnegative_fit(counts, seconds, columns=[0, 1, 2, 3])
    scaled = counts / seconds[:, None]
    gradient = scaled.T @ (scaled @ costs - 1)
    assert (costs >= 0).all()
    assert np.abs(gradient[costs > 0]).max(initial=0.0) < 1e-9
    assert (gradient[costs == 0] > -1e-9).all()
