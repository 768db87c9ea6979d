"""With fixed rollouts, one rank, tensor, pipeline and data parallel runs report the same metrics.

Every model takes one optimizer step a PPO step, on the mean over all tokens: how the rollouts are dealt over ranks and
packs, which differs between layouts, then changes nothing but the order of sums.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_orz import ppo
from megatron_orz.algorithms.algorithm import Absent
from megatron_orz.compose import compose
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.data.packing import pack_demonstrations
from megatron_orz.data.prompts import PromptStream
from megatron_orz.logs import RunLog, read_metrics
from megatron_orz.metrics.rollouts import rollout_metrics
from megatron_orz.metrics.traits import traits_of
from megatron_orz.types import Demonstration, Grade, Metrics, NamedWeights, Prompt, Rollout
from tests.engine import tiny
from tests.launch import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS = 2
# float32 sums in another order, carried through two optimizer steps.
RELATIVE_TOLERANCE = 1e-4
# For what is 0 by definition: the KL divergence and the clipped share of a ratio of 1, the mean whitened advantage.
ZERO_TOLERANCE = 1e-6
PROBE = Demonstration(token_ids=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], loss_mask=[False] * 5 + [True] * 10)


class ReplayFleet:
    """Answers with random tokens that depend on the prompt and the seed alone, and never on the weights."""

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        for _ in weights:  # every rank has its part in the iterator
            pass

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        rng = random.Random(seed)
        return [
            Rollout(
                prompt=prompt,
                response_ids=(ids := [rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(1, 24))]),
                rollout_log_probs=[rng.uniform(-6, -3) for _ in ids],
                finish_reason=rng.choice(["stop", "length"]),
                policy_version=0,
            )
            for prompt in prompts
            for _ in range(num_responses)
        ]


class ParityGrader:
    """Rewards responses of even length."""

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        grades = [
            Grade(reward=float(is_even), is_correct=is_even, is_formatted=True, timed_out=False, extracted=None)
            for rollout in rollouts
            for is_even in [len(rollout.response_ids) % 2 == 0]
        ]
        return [replace(rollout, grade=grade) for rollout, grade in zip(rollouts, grades, strict=True)]


def run_layout(model: Path, run_dir: Path, parallel: ParallelConfig) -> None:
    """What one rank does."""
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    # With the usual eps of 1e-8 the update of a weight whose gradient is almost 0 is its sign, which is noise.
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1)
    config = Config(
        run_dir=run_dir,
        policy=ModelConfig(path=model, optimizer=optimizer),
        critic=CriticConfig(path=model, optimizer=optimizer),
        ppo=PPOConfig(num_steps=NUM_STEPS, num_prompts=5, num_responses=3, num_critic_updates=1),
        sampling=SamplingConfig(max_response_tokens=24),
        data=DataConfig(train=(Path("none"),), max_prompt_tokens=16, max_pack_tokens=80),
        evaluation=EvaluationConfig(data=(Path("none"),), interval=1),
        parallel=parallel,
    )
    rng = random.Random(1)
    prompts = [
        Prompt(
            prompt_id=number,
            token_ids=[rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(2, 16))],
            answer="",
            source="test",
        )
        for number in range(8)
    ]
    probe = pack_demonstrations([PROBE], max_pack_tokens=80)
    with open_mesh(parallel, seed=0) as mesh:
        policy = PolicyEngine(config.policy, mesh)
        assert config.critic is not None
        critic = CriticEngine(config.critic, mesh)

        def evaluate() -> Metrics:
            """What both models say of a fixed text, so that the weights after the last step are compared too."""
            mask = probe[0].loss_mask
            return {
                f"evaluation/{name}": float(engine.infer(probe)[0][mask].mean())
                for name, engine in (("log_prob", policy), ("value", critic))
            }

        def record_rollouts(step: int, rollouts: Sequence[Rollout]) -> Metrics:
            return rollout_metrics(rollouts, traits_of([""] * len(rollouts), [r.response_ids for r in rollouts]))

        console = Console(file=io.StringIO())
        with RunLog(run_dir, num_steps=NUM_STEPS, is_main=mesh.rank == 0, console=console) as log:
            ppo.run(
                config,
                algorithm=compose(config),
                policy=policy,
                critic=critic,
                reference=Absent(),
                fleet=ReplayFleet(),
                grader=ParityGrader(),
                prompts=PromptStream(prompts, seed=0),
                evaluate=evaluate,
                record_rollouts=record_rollouts,
                ranks=mesh,
                log=log,
            )


def metrics_of(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, metric) -> value, without times and speeds."""
    return {
        (int(row["step"]), name): value
        for row in read_metrics(run_dir / "metrics.jsonl")
        for name, value in row.items()
        if not name.startswith(("time/", "perf/")) and name != "tokens_per_s"
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path, tied=True)
    return path


@pytest.fixture(scope="module")
def one_rank(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float]:
    run_dir = tmp_path_factory.mktemp("one_rank")
    run_layout(model, run_dir, ParallelConfig())
    return metrics_of(run_dir)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(timeout_s=300), ParallelConfig(tp=2, timeout_s=300), ParallelConfig(pp=2, timeout_s=300)],
    ids=["dp2", "tp2", "pp2"],
)
def test_two_ranks_report_the_metrics_of_one(
    model: Path, one_rank: dict[tuple[int, str], float], parallel: ParallelConfig, tmp_path: Path
) -> None:
    run_ranks(2, run_layout, model, tmp_path, parallel)
    metrics = metrics_of(tmp_path)
    assert len([name for step, name in one_rank if step == 0]) > 20
    assert metrics == pytest.approx(one_rank, rel=RELATIVE_TOLERANCE, abs=ZERO_TOLERANCE, nan_ok=True)
