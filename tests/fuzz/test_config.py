"""Whatever a recipe or a command line asks for: a config that can be run, or one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
import typing
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from megatron_orz.command_line import parse
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    to_json,
)
from tests.fuzz.inputs import fuzz, refusal, sizes

MODEL = {"path": Path("model"), "optimizer": OptimizerConfig(lr=1e-3)}
SECTIONS: dict[str, Any] = {
    "policy": ModelConfig(**MODEL),
    "critic": CriticConfig(**MODEL),
    "ppo": PPOConfig(num_steps=2),
    "sampling": SamplingConfig(max_response_tokens=64),
    "data": DataConfig(train=(Path("train.jsonl"),)),
    "parallel": ParallelConfig(),
    "reward": RewardConfig(),
    "fleet": FleetConfig(),
    "evaluation": EvaluationConfig(),
}
WHOLE = Config(run_dir=Path("run"), **SECTIONS)

integers = st.integers(-3, 10**5) | st.sampled_from([0, -1, 2**31, 2**63, 10**30])
floats = st.floats() | st.sampled_from([0.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan])


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, sensible or not."""
    if kind is int:
        return integers
    if kind is float:
        return floats | integers.map(float)
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.text(max_size=10)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is Path:
        return st.just(Path("x"))
    if kind == (int | None):
        return st.none() | integers
    if kind == tuple[int, ...]:
        return st.lists(integers, max_size=4).map(tuple)
    return st.nothing()


def changes(section: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Up to three other values for the fields of a section."""
    kinds = typing.get_type_hints(type(section))
    strategies = {name: values_of(kind) for name, kind in kinds.items()}
    usable = {name: strategy for name, strategy in strategies.items() if not strategy.is_empty}
    return st.lists(st.sampled_from(sorted(usable)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: usable[name] for name in names})
    )


sections = st.sampled_from(sorted(SECTIONS)).flatmap(lambda name: st.tuples(st.just(name), changes(SECTIONS[name])))


@sizes(slow=20_000)
def test_recipes(num_inputs: int) -> None:
    fuzz(sections, check_recipe, num_inputs=num_inputs)


def check_recipe(change: tuple[str, dict[str, Any]]) -> None:
    name, values = change
    configs: list[Config] = []
    message = refusal(
        lambda: configs.append(dataclasses.replace(WHOLE, **{name: dataclasses.replace(SECTIONS[name], **values)}))
    )
    if message is not None:
        assert len(message) > 10
        return
    [config] = configs
    # What is accepted has no number that is none, and can be written and read.
    json.loads(to_json(config), parse_constant=lambda constant: refuse_constant(f"{constant} in {change}"))
    assert all(value > 0 for _, value in timeouts(config))


def timeouts(config: Config) -> list[tuple[str, float]]:
    """Every deadline of a config."""
    parts = [config, config.parallel, config.fleet, config.reward]
    fields = [(part, field.name) for part in parts for field in dataclasses.fields(part) if "timeout_s" in field.name]
    return [(name, getattr(part, name)) for part, name in fields]


def refuse_constant(message: str) -> None:
    raise AssertionError(message)


words = st.sampled_from(
    [
        "--ppo.num-steps",
        "--policy.optimizer.lr",
        "--fleet.kind",
        "--run-dir",
        "--help",
        "--dry-run",
        "--data.train",
        "--",
    ]
) | st.text(max_size=8)
arguments = st.lists(words | integers.map(str) | floats.map(str), max_size=5)


@sizes(slow=400)
def test_command_lines(num_inputs: int) -> None:
    fuzz(arguments, check_command_line, num_inputs=num_inputs)


def check_command_line(argv: list[str]) -> None:
    with (
        mock.patch.object(sys, "argv", ["recipe.py", *argv]),
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
    ):
        code = None
        try:
            parse(WHOLE)
        except SystemExit as end:
            code = end.code
    said = stderr.getvalue() + stdout.getvalue()
    assert code in (None, 0, 2)
    assert said or code is None
    assert "Traceback" not in said
