"""Every algorithm of docs/algorithms.md, run as its row says, on the demo's model."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_orz.config import Config
from megatron_orz.logs import read_metrics

ROOT = Path(__file__).parents[1]
BASE_VARIABLE = "ORZ_DEMO_BASE"
NUM_STEPS = 5


def documented() -> list[tuple[str, list[str]]]:
    """(algorithm, options) of each row of the first table."""
    table = (ROOT / "docs" / "algorithms.md").read_text().split("\n\n")[2]
    rows = re.findall(r"^\| ([^|]+) \| `([^|`]+)` \|", table, flags=re.M)
    return [(name, shlex.split(options)) for name, options in rows]


def parsed(options: list[str]) -> Config:
    from runpy import run_path

    import tyro

    from megatron_orz.command_line import CHOICES_OF_DEFAULTS

    recipe = run_path(str(ROOT / "examples" / "demo.py"))["RECIPE"]
    config = tyro.cli(Config, default=recipe, args=options, config=CHOICES_OF_DEFAULTS)
    assert isinstance(config, Config)
    return config


def test_the_table_names_the_algorithms() -> None:
    assert [name for name, _ in documented()] == [
        "PPO",
        "decoupled GAE",
        "length-adaptive GAE",
        "GRPO",
        "Dr. GRPO",
        "RLOO",
        "REINFORCE++ with baseline",
        "DAPO",
    ]


@pytest.mark.parametrize(("name", "options"), documented())
def test_the_options_of_a_row_are_a_config(name: str, options: list[str]) -> None:
    config = parsed(["--kl.reference", "model", *options])
    assert config.ppo.uses_critic == ("GAE" in name or name == "PPO")
    assert (config.kl.coefficient > 0) == (name in ("GRPO", "RLOO", "REINFORCE++ with baseline"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), documented())
def test_it_runs_and_its_metrics_are_sane(name: str, options: list[str], tmp_path: Path) -> None:
    """Five steps of 16 prompts; the demo's base model lies where the environment says, or is skipped."""
    base = Path(os.environ.get(BASE_VARIABLE, ROOT / "runs" / "demo-base"))
    if not (base / "final").exists():
        pytest.skip(f"run examples/demo_base.py first, or name its output in {BASE_VARIABLE}")
    # Where the demo looks for it; else it would train one.
    shutil.copytree(base, tmp_path / "runs" / "demo-base")
    place = tmp_path / "run"
    arguments = {
        "--run-dir": place,
        "--policy.path": base / "final",
        "--critic.path": base / "final",
        "--kl.reference": base / "final",
        "--data.train": base / "train.jsonl",
        "--fleet.kind": "local",
        "--ppo.num-steps": NUM_STEPS,
        "--ppo.num-prompts": 16,
        "--ppo.num-critic-updates": 2,
        "--checkpoint.interval": 0,
    }
    given = [str(part) for pair in arguments.items() for part in pair]
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *given, "--evaluation.data", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(place / "metrics.jsonl")[:NUM_STEPS]
    config = parsed(["--kl.reference", "model", *options])
    assert len(rows) == NUM_STEPS
    for step, row in enumerate(rows):
        learns = step >= config.ppo.num_critic_warmup_steps
        assert ("policy/loss" in row) == learns
        assert ("critic/loss" in row) == config.ppo.uses_critic
        assert ("policy/reference_kl" in row) == (learns and config.kl.coefficient > 0)
        assert row["log_prob_mismatch/max"] < 1e-3
        assert 0.05 < row["reward/mean"] < 1
        if learns:
            assert 0 < row["policy/grad_norm"] < 100
            assert math.isfinite(row["policy/loss"])
            # One update on fresh rollouts: the policy is the old one.
            assert row["policy/ratio"] == pytest.approx(1, abs=1e-4)
    if config.kl.coefficient > 0:
        # From the reference itself, and then away from it.
        assert abs(rows[0]["policy/reference_kl"]) < 1e-5 < abs(rows[-1]["policy/reference_kl"])
