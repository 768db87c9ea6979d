"""A profile from what a real run leaves behind: trainer and vLLM server, a step ahead."""

from __future__ import annotations

import importlib.util
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_orz.simulation.course import simulate
from megatron_orz.simulation.measured import measured_profile
from megatron_orz.simulation.runs import read_run
from tests.engine import tiny
from tests.recipe import DEADLINE_S, run_process

ARGUMENTS = (
    "--fleet.kind vllm --fleet.cpu-threads 1 --fleet.kv-cache-gib 0.1 --fleet.max-running 4 "
    "--ppo.max-staleness 1 --ppo.num-steps 5 --ppo.num-prompts 8"
)


@pytest.mark.slow
@pytest.mark.usefixtures("own_place")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_a_run_ahead_tells_its_own_pace(home: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(home / "model", model)
    # The recipe's own has heads that vLLM's CPU kernels do not know.
    tiny.save_model(model, family="qwen3", vocab_size=json.loads((model / "config.json").read_text())["vocab_size"])
    paths = ["--policy.path", str(model), "--critic.path", str(model)]
    with run_process(home, *ARGUMENTS.split(), *paths) as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    run = read_run(tmp_path / "run")
    assert run.max_running == 4
    assert [step.generate_s is None for step in run.steps] == [True, False, False, False]
    for before, step in pairwise(run.steps):
        assert step.train_s + step.wait_s + step.sync_s == pytest.approx(step.step_s)
        assert step.generate_s is not None
        # Asked as the step before began to train, and there when the wait was over.
        assert 0 < step.generate_s < before.train_s + step.wait_s + 0.1
    course = simulate(measured_profile([run]), run.setting, num_steps=4)
    assert 1 / 3 < course.step_s / run.step_s < 3
