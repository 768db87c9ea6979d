"""Profiles from run directories: known costs are found again in what they would have taken."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from megatron_orz.generations import Generation, generations_file, write_generations
from megatron_orz.logs import METRICS_FILE, read_metrics
from megatron_orz.simulation.course import critical_tokens, simulate
from megatron_orz.simulation.measured import RUNNING_ON_CPU, measured_profile, nonnegative_fit
from megatron_orz.simulation.profile import Profile
from megatron_orz.simulation.runs import MeasuredRun, read_run
from megatron_orz.simulation.spans import seconds_alone
from megatron_orz.timeline import TIMELINE_FILE, Timeline

ITERATION_S, RESPONSE_S = 0.05, 0.002
INFER_S, CRITIC_S, POLICY_S, UPDATE_S = 1e-3, 2e-3, 3e-3, 0.2
SYNC_S, GRADE_S = 0.4, 0.001
TO_SERVERS_S, TO_TRAINER_S = 0.3, 0.2
PROMPT_TOKENS = 12


def write_run(run_dir: Path, *, num_prompts: int, num_responses: int, slowness: float = 1.0, **changes: Any) -> Path:
    """Four steps of a run with one server and one rank, which took what the costs above make of their tokens.

    slowness: of the third step's generation. changes: of the config's ppo and fleet.
    """
    rng = random.Random(num_prompts)
    run_dir.mkdir()
    ppo = {"num_critic_updates": 4, "num_policy_updates": 1, "advantages": "gae", "max_staleness": 0}
    fleet = {"kind": "vllm", "urls": [], "num_servers": 1, "server_tp": 1, "colocated": False, "max_running": None}
    fleet |= {"swaps_within_responses": False}
    ppo |= {"num_prompts": num_prompts, "num_responses": num_responses, "oversampling": 0.0, "max_resampling_rounds": 0}
    config: dict[str, dict[str, Any]] = {
        "ppo": ppo | {name: value for name, value in changes.items() if name not in fleet},
        "fleet": fleet | {name: value for name, value in changes.items() if name in fleet},
        "parallel": {"tp": 1, "pp": 1, "cp": 1},
        "data": {"max_pack_tokens": 4096},
    }
    (run_dir / "config.json").write_text(json.dumps(config))
    num_dropped = math.ceil(num_prompts * changes.get("oversampling", 0.0))
    rows, generate_s = [], []
    for step in range(4):
        asked = [[rng.randint(5, 60) for _ in range(num_responses)] for _ in range(num_prompts + num_dropped)]
        lengths = sorted(asked, key=max)[:num_prompts]
        flat = [length for group in lengths for length in group]
        assert sum(map(len, asked)) <= RUNNING_ON_CPU, "the closed form below knows no waiting"
        sequences = tuple(PROMPT_TOKENS + length - 1 for length in flat)
        infer, critic, policy = critical_tokens(sequences, 4096, 1, (1, 4, 1))
        decoded = sum(min(length, max(flat)) for group in asked for length in group)
        generate_s.append((ITERATION_S * max(flat) + RESPONSE_S * decoded) * (slowness if step == 2 else 1))
        rows.append(
            {
                "step": step,
                "time/sync_s": SYNC_S,
                "time/evaluate_s": 100.0,
                "time/generate_s": generate_s[-1],
                "time/reward_s": GRADE_S * len(flat),
                "time/infer_s": INFER_S * infer,
                "time/critic_s": CRITIC_S * critic + 4 * UPDATE_S,
                "time/policy_s": POLICY_S * policy + UPDATE_S,
                "perf/step_s": 8.0,
                "perf/tokens_per_s_per_gpu": sum(sequences) / 8.0,
            }
        )
        generations = [generation(step, prompt, length) for prompt, group in enumerate(lengths) for length in group]
        assert write_generations(generations, generations_file(run_dir, step), max_mib=10) == 0
    rows[0]["time/critic_s"] += 1000.0  # what is done once falls into the first step
    if config["ppo"]["max_staleness"]:
        generate_ahead(run_dir, rows, generate_s)
    if config["fleet"]["colocated"]:
        take_turns(rows)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def generate_ahead(run_dir: Path, rows: list[dict[str, float]], generate_s: Sequence[float]) -> None:
    """The same steps with generation one step ahead, and their timeline."""
    now = asked = 1000.0
    answered = 0.0
    with Timeline(run_dir / TIMELINE_FILE) as timeline:
        for row, seconds in zip(rows, generate_s, strict=True):
            asked, first_asked = now, asked
            row["time/evaluate_s"] = 0.0
            if row["step"]:
                begun = max(first_asked, answered)  # the second batch is asked beside the first, and answered after it
                answered = begun + seconds
                timeline.on_servers("generate ahead", first_asked, answered)
                row["staleness/wait_s"] = max(0.0, answered - now)
                row["time/sync_s"] += row["staleness/wait_s"]
                row["time/generate_s"] = 0.001
            for name in ("sync", "evaluate", "generate", "reward", "infer", "critic", "policy"):
                if name == "generate":
                    asked = now
                timeline.on_trainer(name, now, now + row[f"time/{name}_s"])
                now += row[f"time/{name}_s"]
            if not row["step"]:
                answered = asked + seconds
                timeline.on_servers("generate ahead", asked, answered)


def take_turns(rows: list[dict[str, float]]) -> None:
    """The same steps where servers and trainer share their GPUs."""
    for row in rows:
        row |= {"sync/send_s": 0.75 * SYNC_S, "sync/verify_s": 0.25 * SYNC_S}
        row["time/sync_s"] += TO_SERVERS_S
        row["time/infer_s"] += TO_TRAINER_S
        row["colocation/switch_s"] = (row["step"] + 1) * (TO_SERVERS_S + TO_TRAINER_S)


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
    assert_costs_are_found(profile, rel=1e-6)
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


def assert_costs_are_found(profile: Profile, *, rel: float) -> None:
    decoding, training = profile.decoding, profile.training
    assert (decoding.iteration_s, decoding.response_s) == pytest.approx((ITERATION_S, RESPONSE_S), rel=rel)
    found = (training.infer_s, training.critic_s, training.policy_s, training.update_s)
    assert found == pytest.approx((INFER_S, CRITIC_S, POLICY_S, UPDATE_S), rel=rel)
    assert (profile.sync_s, profile.rollout_s) == pytest.approx((SYNC_S, GRADE_S), rel=rel)


def two_runs(tmp_path: Path, **changes: Any) -> list[MeasuredRun]:
    return [
        read_run(write_run(tmp_path / "small", num_prompts=2, num_responses=3, **changes)),
        read_run(write_run(tmp_path / "large", num_prompts=12, num_responses=8, **changes)),
    ]


def test_the_timeline_tells_what_generation_beside_training_took(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, max_staleness=1)
    # The second batch was asked while the first one was under way.
    assert [[step.generate_s is None for step in run.steps] for run in runs] == [[True, False, False]] * 2
    assert max(step.wait_s for step in runs[0].steps) > 0.3, "updates waited for responses"
    assert_costs_are_found(measured_profile(runs), rel=1e-4)  # of which the timeline has microseconds
    course = simulate(measured_profile(runs), runs[1].setting, num_steps=60)
    assert course.step_s == pytest.approx(fmean(step.step_s for step in runs[1].steps[1:]), rel=0.05)


def test_steps_that_a_resumed_run_repeats_are_found_on_its_timeline(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_prompts=12, num_responses=8, max_staleness=1)
    before = [step.generate_s for step in read_run(path).steps]
    timeline = path / TIMELINE_FILE
    header, *events = timeline.read_text().splitlines(keepends=True)
    lost = [event.replace('"dur": ', '"dur": 7') for event in events if '"ph": "X"' in event]
    timeline.write_text(header + "".join(events[:12] + lost[10:14] + events[12:]))
    assert [step.generate_s for step in read_run(path).steps] == before


def test_servers_that_answered_several_steps_at_once_tell_no_speed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_prompts=2, num_responses=3, max_staleness=1)
    whole = (path / TIMELINE_FILE).read_text()
    spans = [json.loads(line.rstrip(",")) for line in whole.splitlines()[1:]]
    spans = [span | {"dur": span["dur"] + 10**10} if span.get("name") == "generate ahead" else span for span in spans]
    (path / TIMELINE_FILE).write_text("[\n" + "".join(json.dumps(span) + ",\n" for span in spans))
    with pytest.raises(ValueError, match=r"add a run of ppo\.max_staleness 0 or 1"):
        measured_profile([read_run(path)])
    (path / TIMELINE_FILE).unlink()
    with pytest.raises(ValueError, match=r"timeline\.json is missing"):
        read_run(path)


@pytest.mark.parametrize(("answered", "alone_s"), [(2.9, 1.4), (3.4, None)])
def test_generation_that_an_update_interrupts_tells_no_speed(
    tmp_path: Path, answered: float, alone_s: float | None
) -> None:
    """Servers that swap weights within responses are asked at 1.5 s, and updated from 3 to 4 s."""
    row = {"time/sync_s": 1.0, "time/generate_s": 1.0, "time/infer_s": 1.0}
    with Timeline(tmp_path / TIMELINE_FILE) as timeline:
        for start in (0.0, 3.0):
            timeline.on_trainer("sync", start, start + 1)
            if start:
                timeline.on_servers("generate ahead", 1.5, answered)
            timeline.on_trainer("generate", start + 1, start + 2)
            timeline.on_trainer("infer", start + 2, start + 3)
    assert seconds_alone(tmp_path, [row, row]) == [None, pytest.approx(alone_s)]


def test_dropped_prompts_are_among_what_servers_decode(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, oversampling=0.25)
    profile = measured_profile(runs)
    assert profile.decoding.response_s == pytest.approx(RESPONSE_S, rel=0.1)
    assert profile.decoding.iteration_s == pytest.approx(ITERATION_S, rel=0.02)
    assert "without those of the prompts that over-sampling dropped" in profile.sources["groups"]
    unaware = measured_profile([replace(run, setting=replace(run.setting, oversampling=0.0)) for run in runs])
    assert unaware.decoding.response_s > 1.2 * RESPONSE_S
    whole = read_run(write_run(tmp_path / "whole", num_prompts=4, num_responses=3))
    assert len(measured_profile([*runs, whole]).groups) == 3 * 4


def test_changes_of_turns_are_told_from_updates_and_inference(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, colocated=True)
    profile = measured_profile(runs)
    assert_costs_are_found(profile, rel=1e-6)
    assert profile.switch_s == pytest.approx((TO_SERVERS_S + TO_TRAINER_S) / 2)
    course = simulate(profile, runs[1].setting, num_steps=60)
    assert course.step_s == pytest.approx(runs[1].step_s, rel=0.05)


def test_what_servers_decode_together_is_the_configs_or_else_the_commands(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_prompts=16, num_responses=8, max_running=200))
    assert measured_profile([run], max_running=9).decoding.max_running == 200, "what the config says"
    unsaid = replace(run, max_running=None)
    assert measured_profile([unsaid], max_running=9).decoding.max_running == 9
    assert measured_profile([unsaid]).decoding.max_running == RUNNING_ON_CPU


def test_servers_that_decode_fewer_together_tell_the_cost_of_a_pass(tmp_path: Path) -> None:
    """Two runs of one size: one server decodes all responses together, the other one by one."""
    together = read_run(write_run(tmp_path / "together", num_prompts=16, num_responses=8))
    singly = replace(
        together,
        max_running=1,
        steps=[
            replace(step, generate_s=(ITERATION_S + RESPONSE_S) * sum(map(sum, step.groups))) for step in together.steps
        ],
    )
    decoding = measured_profile([together, singly]).decoding
    assert (decoding.iteration_s, decoding.response_s) == pytest.approx((ITERATION_S, RESPONSE_S), rel=1e-6)
    assert decoding.max_running == RUNNING_ON_CPU


def test_a_step_whose_rollouts_were_not_all_saved_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_prompts=2, num_responses=3)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 2', '"step": 2, "generations/left_out": 4.0'))
    with pytest.raises(ValueError, match=r"step-000002\.parquet lacks 4 rollouts"):
        read_run(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_run(tmp_path)
    run = write_run(tmp_path / "run", num_prompts=2, num_responses=3)
    generations_file(run, 2).unlink()
    with pytest.raises(ValueError, match=r"step-000002\.parquet is missing"):
        read_run(run)
    first_row, *_ = (run / METRICS_FILE).read_text().splitlines(keepends=True)
    (run / METRICS_FILE).write_text(first_row)
    with pytest.raises(ValueError, match="has no step after its first one"):
        read_run(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"fleet": config["fleet"] | {"kind": "local"}}))
    with pytest.raises(ValueError, match="has no servers"):
        read_run(run)
    (run / "config.json").write_text(json.dumps(config | {"ppo": config["ppo"] | {"max_resampling_rounds": 2}}))
    with pytest.raises(ValueError, match="how much of its grading was generation"):
        read_run(run)
    (run / "config.json").write_text(json.dumps({"ppo": {}}))
    with pytest.raises(ValueError, match=r"does not hold the config and the metrics of a run \(KeyError\('fleet'\)\)"):
        read_run(run)


def test_ranks_are_those_that_the_run_was_given(tmp_path: Path) -> None:
    """Each of three makes a third of the tokens a second; of the four steps, the last three are read."""
    path = write_run(tmp_path / "run", num_prompts=4, num_responses=3)
    rows = read_metrics(path / METRICS_FILE)

    def with_ranks(*counts: int) -> MeasuredRun:
        changed = [
            row | {"perf/tokens_per_s_per_gpu": row["perf/tokens_per_s_per_gpu"] / count}
            for row, count in zip(rows, counts, strict=True)
        ]
        (path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in changed))
        return read_run(path)

    assert with_ranks(1, 3, 3, 3).setting.trainer_gpus == 3
    with pytest.raises(ValueError, match=r"went on with other numbers of ranks \(\[2, 3\]\)"):
        with_ranks(1, 3, 3, 2)


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
