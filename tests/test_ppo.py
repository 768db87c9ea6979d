"""The loop itself, on a bigram policy and a critic that is a table, both small enough to learn in a second."""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from megatron_orz import ppo
from megatron_orz.algorithms.algorithm import Absent, Algorithm
from megatron_orz.compose import compose
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.data.prompts import PromptStream
from megatron_orz.logs import RunLog, read_metrics
from megatron_orz.metrics.rollouts import rollout_metrics
from megatron_orz.metrics.traits import Traits
from megatron_orz.types import AdvantageKind, Experience, Metrics, NamedWeights, PackedBatch, Rollout
from tests.bigram import (
    GOAL,
    MAX_RESPONSE_TOKENS,
    PROMPTS,
    STOP,
    VOCAB_SIZE,
    BigramPolicy,
    GoalGrader,
    Run,
    StaleFleet,
    TableCritic,
    TableFleet,
    TableModel,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class OneRank:
    dp_rank, dp_size, pack_multiple = 0, 1, 1

    def dp_all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]


def config(run_dir: Path, **ppo_values: Any) -> Config:
    optimizer = OptimizerConfig(lr=1.0)
    return Config(
        run_dir=run_dir,
        policy=ModelConfig(path=Path("none"), optimizer=optimizer),
        critic=CriticConfig(path=Path("none"), optimizer=optimizer),
        ppo=PPOConfig(**({"num_steps": 4, "num_prompts": 4, "num_responses": 8, "num_critic_updates": 2} | ppo_values)),
        sampling=SamplingConfig(max_response_tokens=MAX_RESPONSE_TOKENS),
        data=DataConfig(train=(Path("none"),), max_prompt_tokens=2, max_pack_tokens=40),
        evaluation=EvaluationConfig(data=(Path("none"),), interval=3),
    )


class Interrupted(Exception):
    """Stands for whatever ends a run between two steps."""


class UniformReference:
    """Every token is as likely as any other."""

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        return [torch.full((len(batch.tokens),), -math.log(VOCAB_SIZE)) for batch in batches]

    def refresh(self, step: int) -> None:
        pass


def train(
    config: Config,
    fleet: type[TableFleet] = TableFleet,
    *,
    algorithm: Algorithm | None = None,
    interrupt_at: int | None = None,
) -> Run:
    """interrupt_at: steps after which the run ends and goes on. algorithm: by default that of the config."""
    run = Run()
    server = fleet(run)

    def on_step_end(num_done: int) -> None:
        run.events.append(("done", num_done))
        if num_done == interrupt_at:
            raise Interrupted

    def evaluate() -> Metrics:
        run.events.append(("evaluate", server.version))
        return {"evaluation/test/score": 10.0 + server.version}

    def record_rollouts(step: int, rollouts: Sequence[Rollout]) -> Metrics:
        run.events.append(("record", (step, rollouts)))
        return rollout_metrics(rollouts, [Traits(reflection=(), repetition=0.0)] * len(rollouts))

    with RunLog(config.run_dir, num_steps=config.ppo.num_steps, console=Console(file=io.StringIO())) as log:
        go = partial(
            ppo.run,
            config,
            algorithm=algorithm or compose(config),
            policy=BigramPolicy(run),
            critic=TableCritic(run) if config.ppo.uses_critic else Absent(),
            reference=UniformReference() if config.kl.coefficient > 0 else Absent(),
            fleet=server,
            grader=GoalGrader(),
            prompts=PromptStream(PROMPTS, seed=config.seed),
            evaluate=evaluate,
            record_rollouts=record_rollouts,
            ranks=OneRank(),
            log=log,
        )
        try:
            go(on_step_end=on_step_end)
        except Interrupted:
            go(num_done=run.contents("done")[-1])
    run.rows = read_metrics(config.run_dir / "metrics.jsonl")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps that tests look at from several sides."""
    return train(config(tmp_path_factory.mktemp("run"), num_policy_updates=3))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reward_rises_to_one(tmp_path: Path, seed: int) -> None:
    rewards = train(replace(config(tmp_path, num_steps=30, num_responses=16), seed=seed)).column("reward/mean")
    # An untrained policy stops right after the goal in fewer than 1 of 8 responses.
    assert rewards[0] < 0.2
    assert fmean(rewards[-5:]) > 0.95


def test_step_n_is_generated_by_version_n(run: Run) -> None:
    calls = [kind for kind, _ in run.events if kind in ("update", "generate", "critic", "policy")]
    assert calls == ["update", "generate", "critic", "critic", "policy", "policy", "policy"] * 4 + ["update"]
    assert run.contents("update") == [0, 1, 2, 3, 4]
    for step, rollouts in enumerate(run.contents("generate")):
        assert {rollout.policy_version for rollout in rollouts} == {step}


def test_a_run_goes_on_behind_the_steps_that_are_done(run: Run, tmp_path: Path) -> None:
    again = train(config(tmp_path, num_policy_updates=3), interrupt_at=2)
    assert run.contents("done") == [1, 2, 3, 4]
    assert again.contents("done") == [1, 2]
    for kind in ("update", "evaluate", "generate", "seed"):
        assert again.contents(kind) == run.contents(kind), kind
    assert [row["step"] for row in again.rows] == [0, 1, 2, 3, 4]
    for before, after in zip(run.rows, again.rows, strict=True):
        assert before.get("policy/loss") == after.get("policy/loss")


def num_alive(*kinds: type) -> int:
    return sum(type(thing) in kinds for thing in gc.get_objects())


def test_updates_do_without_the_rollouts_and_the_next_step_without_the_experience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    alive_in_updates: list[int] = []
    take_step = TableModel.take_step

    def watched_step(model: TableModel, *arguments: Any) -> Metrics:
        model.run.events.clear()  # which would keep them all
        alive_in_updates.append(num_alive(Rollout))
        return take_step(model, *arguments)

    def update_weights(fleet: TableFleet, weights: NamedWeights, version: int) -> None:
        fleet.log_p, fleet.version = dict(weights)["table"].log_softmax(-1), version
        fleet.run.events.clear()
        alive.append(num_alive(Rollout, PackedBatch, Experience))

    num_before = num_alive(Rollout)
    monkeypatch.setattr(TableModel, "take_step", watched_step)
    monkeypatch.setattr(TableFleet, "update_weights", update_weights)
    train(config(tmp_path))
    assert len(alive) == 5
    assert len(set(alive)) == 1
    assert alive_in_updates == [num_before] * 12


def test_an_epoch_takes_every_prompt_once(tmp_path: Path) -> None:
    run = train(config(tmp_path, num_steps=6))
    steps = [[rollout.prompt.prompt_id for rollout in rollouts[::8]] for rollouts in run.contents("generate")]
    epochs = steps[0] + steps[1] + steps[2], steps[3] + steps[4] + steps[5]
    for epoch in epochs:
        assert sorted(epoch) == [prompt.prompt_id for prompt in PROMPTS]
    assert epochs[0] != epochs[1], "every epoch has an order of its own"


def test_the_seed_decides_a_run_and_every_step_of_every_run_draws_anew(tmp_path: Path) -> None:
    first, again, other = (
        train(replace(config(tmp_path / str(number)), seed=seed)) for number, seed in enumerate([5, 5, 6])
    )
    assert first.contents("generate") == again.contents("generate")
    assert first.contents("generate")[0] != other.contents("generate")[0]
    assert len({*first.contents("seed"), *other.contents("seed")}) == 8


def responses(minibatches: Sequence[Sequence[Experience]]) -> Iterator[tuple[list[int], Experience, Tensor]]:
    """(response_ids, experience, positions) of every sequence in the mini-batches."""
    for experience in (experience for minibatch in minibatches for experience in minibatch):
        for positions in torch.arange(len(experience.tokens)).tensor_split(experience.cu_seqlens[1:-1].long()):
            kept = positions[experience.loss_mask[positions]]
            yield experience.targets[kept].tolist(), experience, kept


def test_every_update_takes_its_part_of_the_rollouts(run: Run) -> None:
    for step, rollouts in enumerate(run.contents("generate")):
        expected = sorted(rollout.response_ids for rollout in rollouts)
        for model, num_updates in (("critic", 2), ("policy", 3)):
            minibatches = run.contents(model)[num_updates * step : num_updates * (step + 1)]
            assert len(minibatches) == num_updates
            assert sorted(ids for ids, *_ in responses(minibatches)) == expected
            sizes = [len(minibatch) for minibatch in minibatches]
            assert max(sizes) - min(sizes) <= 1


def test_the_losses_see_the_returns_and_whitened_advantages_of_the_rewards(run: Run) -> None:
    """With gamma = lambda = 1 the return of every token is the reward of its response, and A = R - V, whitened."""
    for step, rollouts in enumerate(run.contents("generate")):
        rewards = {tuple(r.response_ids): r.grade.reward for r in GoalGrader().grade(rollouts) if r.grade}
        raw, whitened = [], []
        for ids, experience, kept in responses(run.contents("policy")[3 * step : 3 * step + 3]):
            torch.testing.assert_close(experience.returns[kept], torch.full((len(ids),), rewards[tuple(ids)]))
            raw.append(rewards[tuple(ids)] - experience.old_values[kept])
            whitened.append(experience.advantages[kept])
        advantages = torch.cat(raw).double()
        expected = (advantages - advantages.mean()) / advantages.std(correction=0)
        torch.testing.assert_close(torch.cat(whitened).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("advantages", ["group_normalised", "group_centred", "leave_one_out"])
def test_without_a_critic_the_reward_rises_and_nothing_is_said_of_one(
    tmp_path: Path, advantages: AdvantageKind
) -> None:
    run = train(config(tmp_path, num_steps=30, num_responses=16, advantages=advantages, whiten_advantages=False))
    assert fmean(run.column("reward/mean")[-5:]) > 0.95
    assert run.contents("critic") == []
    assert not [name for row in run.rows for name in row if "critic" in name]


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_an_only_update_finds_what_it_would_be_told(tmp_path: Path, coefficient: float) -> None:
    recipe = replace(config(tmp_path), kl=KLConfig(coefficient=coefficient, reference=Path("none")))
    algorithm = compose(recipe)
    assert algorithm.is_on_policy(1)
    told = train(replace(recipe, run_dir=tmp_path / "told"), algorithm=replace(algorithm, needs_old_log_probs=True))
    found = train(replace(recipe, run_dir=tmp_path / "found"), algorithm=algorithm)
    assert found.contents("generate") == told.contents("generate")
    for metric in ("policy/loss", "policy/ratio", "log_prob_mismatch/max"):
        assert found.column(metric) == told.column(metric)
    assert (found.column("policy/reference_kl") == told.column("policy/reference_kl") != []) == (coefficient > 0)


def test_a_critic_that_warms_up_learns_alone(tmp_path: Path) -> None:
    run = train(config(tmp_path, num_critic_warmup_steps=2))
    calls = [kind for kind, _ in run.events if kind in ("generate", "critic", "policy")]
    assert calls == ["generate", "critic", "critic"] * 2 + ["generate", "critic", "critic", "policy"] * 2
    assert [row["step"] for row in run.rows if "policy/loss" in row] == [2, 3]


def test_rows_hold_the_documented_metrics(run: Run) -> None:
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4]
    spans = {f"time/{phase}_s" for phase in ("sync", "generate", "reward", "infer", "critic", "policy")}
    for step, rollouts in enumerate(run.contents("generate")):
        row = run.rows[step]
        rewards = [float(rollout.response_ids[-2:] == [GOAL, STOP]) for rollout in rollouts]
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        assert row["reward/mean"] == pytest.approx(fmean(rewards))
        assert row["response/length_mean"] == pytest.approx(fmean(lengths))
        assert row["response/length_max"] == max(lengths)
        stopped = fmean(rollout.response_ids[-1] == STOP for rollout in rollouts)
        assert row["response/format_share"] == pytest.approx(stopped)
        assert row["response/truncated_share"] == pytest.approx(1 - stopped)
        assert spans <= row.keys()
        # A response's last token is never an input, so a prompt of two tokens adds one.
        seconds = (sum(lengths) + len(lengths)) / row["tokens_per_s"]
        assert sum(row[span] for span in spans) <= seconds < 10
        assert {"log_prob_mismatch/max", "critic/explained_variance", "critic/loss", "policy/entropy"} <= row.keys()
    assert run.rows[4].keys() == {"step", "evaluation/test/score", "time/sync_s", "time/evaluate_s"}


def test_fresh_weights_leave_no_mismatch(run: Run) -> None:
    # Both sides take the same logarithms, so that only a rounding can differ.
    assert max(run.column("log_prob_mismatch/max")) < 1e-6


def test_a_fleet_that_keeps_old_weights_shows_in_the_mismatch(tmp_path: Path) -> None:
    mismatches = train(config(tmp_path), StaleFleet).column("log_prob_mismatch/max")
    assert mismatches[0] < 1e-6
    assert min(mismatches[1:]) > 1e-3


@pytest.mark.parametrize(("num_steps", "expected"), [(4, [0, 3, 4]), (6, [0, 3, 6]), (1, [0, 1])])
def test_evaluation_comes_first_at_every_interval_and_last(tmp_path: Path, num_steps: int, expected: list[int]) -> None:
    run = train(config(tmp_path, num_steps=num_steps))
    assert run.contents("evaluate") == expected
    scores = {row["step"]: row["evaluation/test/score"] for row in run.rows if "evaluation/test/score" in row}
    assert scores == {step: 10.0 + step for step in expected}
    kinds = [kind for kind, _ in run.events if kind in ("evaluate", "generate")]
    assert kinds[0] == "evaluate"
    assert kinds[-1] == "evaluate"
