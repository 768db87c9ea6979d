"""Rates of a step, from spans and rollouts that are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_orz import performance
from megatron_orz.benchmark.countdown_work import Work
from megatron_orz.benchmark.end_to_end import our_config
from megatron_orz.config import FleetConfig
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.flops import model_flops
from megatron_orz.engine.peak_flops import PeakFlops
from megatron_orz.performance import PerformanceMeter
from megatron_orz.types import Prompt, Rollout
from tests.engine import tiny

PEAK = 1e9


def rollout(num_prompt: int, num_response: int) -> Rollout:
    prompt = Prompt(prompt_id=0, token_ids=[1] * num_prompt, answer="1", source="test")
    return Rollout(
        prompt=prompt,
        response_ids=[2] * num_response,
        rollout_log_probs=[-1.0] * num_response,
        finish_reason="stop",
        policy_version=0,
    )


@pytest.fixture
def meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerformanceMeter:
    """Of two trainer ranks beside three servers."""
    return meter_of(FleetConfig(kind="vllm", num_servers=3), tmp_path, monkeypatch)


def meter_of(fleet: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerformanceMeter:
    monkeypatch.setattr(performance, "peak_flops", lambda device, dtype: PeakFlops(rate=PEAK, source="nominal"))
    work = Work(
        folder=tmp_path,
        response_lengths=(4, 4),
        num_responses=2,
        num_steps=2,
        prompt_tokens=3,
        max_pack_tokens=64,
        trl_rows=2,
    )
    tiny.config_of("llama").save_pretrained(work.model)
    config = our_config(work, critic=True, fleet=fleet)
    return PerformanceMeter(config, needs_old_log_probs=True, world_size=2, device=torch.device("cpu"))


def test_rates_are_tokens_and_operations_by_the_seconds_of_their_phase(
    meter: PerformanceMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performance.time, "perf_counter", lambda: 110.0)
    record = meter.observing(lambda step, rollouts: {"rollouts": float(len(rollouts))})
    meter.on_span("sync", 100.0, 100.5)
    meter.on_span("evaluate", 100.5, 102.5)
    meter.on_span("generate", 102.5, 103.5)
    assert record(0, [rollout(3, 4), rollout(3, 2)]) == {"rollouts": 2.0}
    meter.on_span("infer", 104.0, 105.0)
    meter.on_span("policy", 105.0, 109.0)
    metrics = meter.metrics()

    architecture = read_architecture(tmp_path / "model")
    policy = model_flops(architecture, [6, 4], num_head_tokens=6)
    critic = model_flops(architecture, [6, 4], num_head_tokens=6, value_head=True)
    done = policy.forward + critic.forward + policy.training  # the servers generate
    assert metrics == pytest.approx(
        {
            "perf/step_s": 8.0,  # 10 s, 2 of them evaluation
            "perf/peak_tflops": PEAK / 1e12,
            "perf/tokens_per_s_per_gpu": 10 / 8 / 2,
            "perf/mfu": done / 8 / (2 * PEAK),
            "perf/generate_tokens_per_s_per_gpu": 6 / 1 / 3,
            "perf/generate_mfu": policy.forward / (3 * PEAK),
            "perf/infer_tokens_per_s_per_gpu": 10 / 2,
            "perf/infer_mfu": (policy.forward + critic.forward) / (2 * PEAK),
            "perf/policy_tokens_per_s_per_gpu": 10 / 4 / 2,
            "perf/policy_mfu": policy.training / 4 / (2 * PEAK),
        }
    )


@pytest.mark.parametrize(
    ("fleet", "is_theirs"),
    [
        (FleetConfig(kind="local"), True),
        (FleetConfig(kind="vllm", num_servers=2, colocated=True), True),
        (FleetConfig(kind="vllm", num_servers=2), False),
    ],
    ids=["local", "colocated", "separate"],
)
def test_the_trainers_gpus_do_the_operations_of_generation_where_it_is_theirs(
    fleet: FleetConfig, is_theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = meter_of(fleet, tmp_path, monkeypatch)
    monkeypatch.setattr(performance.time, "perf_counter", lambda: 10.0)
    meter.on_span("generate", 0.0, 4.0)
    meter.observing(lambda step, rollouts: {})(0, [rollout(3, 4)])
    meter.on_span("policy", 4.0, 8.0)
    policy = model_flops(read_architecture(tmp_path / "model"), [6], num_head_tokens=4)
    done = policy.training + is_theirs * policy.forward
    assert meter.metrics()["perf/mfu"] == pytest.approx(done / 10 / (2 * PEAK))


def test_an_update_that_finds_the_log_probabilities_leaves_the_critic_alone_to_infer(
    meter: PerformanceMeter, tmp_path: Path
) -> None:
    meter._needs_old_log_probs = False
    critic = model_flops(read_architecture(tmp_path / "model"), [6], num_head_tokens=4, value_head=True)
    for has_update in (True, False):
        meter.observing(lambda step, rollouts: {})(0, [rollout(3, 4)])
        meter.on_span("infer", 0.0, 2.0)
        if has_update:
            meter.on_span("policy", 2.0, 3.0)
        is_critic_alone = meter.metrics()["perf/infer_mfu"] == pytest.approx(critic.forward / 2 / (2 * PEAK))
        assert is_critic_alone == has_update


def test_a_record_without_rollouts_has_no_rates_and_the_next_step_begins_after_it(
    meter: PerformanceMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performance.time, "perf_counter", lambda: 20.0)
    meter.on_span("sync", 10.0, 11.0)
    assert meter.metrics() == {}
    monkeypatch.setattr(performance.time, "perf_counter", lambda: 25.0)
    meter.on_span("generate", 21.0, 22.0)
    meter.observing(lambda step, rollouts: {})(1, [rollout(3, 4)])
    assert meter.metrics()["perf/step_s"] == 5.0
