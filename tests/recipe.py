"""A recipe as users write one, small enough to run in seconds, and how tests run it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_orz import ppo
from megatron_orz.conversion.convert import plan_hf_to_megatron
from megatron_orz.data.synthetic import ArithmeticTask, build_tokenizer, make_problems, write_problems
from megatron_orz.logs import read_metrics
from megatron_orz.types import Metrics
from tests.engine import tiny

DEADLINE_S = 400

RECIPE = """
from pathlib import Path

from megatron_orz import train
from megatron_orz.config import (
    Config, CriticConfig, DataConfig, EvaluationConfig, FleetConfig, ModelConfig, OptimizerConfig, PPOConfig,
    SamplingConfig,
)

HERE = Path(__file__).parent
RECIPE = Config(
    run_dir=Path("run"),
    policy=ModelConfig(path=HERE / "model", optimizer=OptimizerConfig(lr=1e-3)),
    critic=CriticConfig(path=HERE / "model", optimizer=OptimizerConfig(lr=1e-3)),
    ppo=PPOConfig(num_steps=2, num_prompts=4, num_responses=2, num_critic_updates=2),
    sampling=SamplingConfig(max_response_tokens=16),
    data=DataConfig(train=(HERE / "train.jsonl",), template="short", max_prompt_tokens=48, max_pack_tokens=128),
    fleet=FleetConfig(kind="local", max_model_tokens=64),
    evaluation=EvaluationConfig(data=(HERE / "held_out.jsonl",), num_responses=2),
)

if __name__ == "__main__":
    train.main(RECIPE)
"""


def write_home(home: Path) -> None:
    """Writes the recipe, with a model and data."""
    (home / "recipe.py").write_text(RECIPE)
    tokenizer = build_tokenizer()
    tiny.save_model(home / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(home / "model")
    train, held_out = make_problems(ArithmeticTask(), num_train=30, num_held_out=4, seed=0)
    write_problems(home / "train.jsonl", train)
    write_problems(home / "held_out.jsonl", held_out)


def fill_home(home: Path) -> None:
    """`write_home`, and what is wrong with other models and data."""
    write_home(home)
    for name in ("no_tokenizer", "no_weights", "damaged_tokenizer", "other_tokenizer", "gpt2"):
        shutil.copytree(home / "model", home / name)
    for file in (home / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    (home / "no_weights" / "model.safetensors").unlink()
    plan_hf_to_megatron(home / "model", home / "megatron").run(lambda _: None)
    (home / "damaged_tokenizer" / "tokenizer.json").write_text("{}")
    other = json.loads((home / "model" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (home / "other_tokenizer" / "tokenizer.json").write_text(json.dumps(other))
    (home / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    tiny.save_model(home / "small_vocabulary")
    build_tokenizer().save_pretrained(home / "small_vocabulary")
    (home / "empty.jsonl").write_text("\n")
    (home / "malformed.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "ans\n')
    (home / "columns.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (home / "again").mkdir()
    shutil.copy(home / "held_out.jsonl", home / "again")


def command_line(home: Path, *arguments: str) -> int:
    """Runs the recipe with these arguments, in this process. Returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe.py", *(argument.format(home=home) for argument in arguments)])
        try:
            runpy.run_path(str(home / "recipe.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def sentence(stderr: str) -> str:
    """The one thing that stderr says, in our line or in tyro's box."""
    text = " ".join(re.sub("[─│╭╮╰╯]", " ", stderr).split())
    said = re.fullmatch(
        r"(?:error(?: on rank \d)?:|Value error Error parsing \S+:) (.*?)( ?For full helptext, see \S+ --help)?", text
    )
    assert said, stderr
    return said[1]


def run_process(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The recipe as a process of its own, as from a shell."""
    return subprocess.Popen(
        [sys.executable, str(home / "recipe.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
    )


@dataclass(frozen=True)
class Finished:
    """A run of two steps, done twice in the same place."""

    place: Path
    out: str
    weights: dict[str, Tensor]
    """The policy's, after the last step of the second run."""

    @property
    def run_dir(self) -> Path:
        return self.place / "run"


def run_twice(home: Path, place: Path) -> Finished:
    """Runs the recipe in an empty directory, and once more afresh."""
    weights: dict[str, Tensor] = {}
    run = ppo.run

    def run_and_keep_weights(*args: Any, **options: Any) -> None:
        run(*args, **options)
        weights.update((name, weight.clone()) for name, weight in options["policy"].hf_weights())

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert command_line(home) == 0
        patch.setattr(ppo, "run", run_and_keep_weights)
        out = place / "out"
        with out.open("w") as file:
            patch.setattr(sys, "stdout", file)
            assert command_line(home, "--fresh") == 0
    return Finished(place=place, out=out.read_text(), weights=weights)


def without_times(run_dir: Path) -> list[Metrics]:
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "perf/", "memory/")) and name != "tokens_per_s"
        }
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]
