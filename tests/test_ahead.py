"""What is asked when, and which policy answers, when the fleet works a step ahead of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.ahead import OneStepAhead
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    FleetConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.data.prompts import PromptStream
from megatron_orz.types import NamedWeights, Prompt, Rollout

PROMPTS = [Prompt(prompt_id=number, token_ids=[number], answer="", source="test") for number in range(10)]


class Servers:
    """Answers with the seed, by the weights it holds when it is asked."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.version = -1
        self.started: list[Rollout] | None = None

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        assert self.started is None, "weights were swapped amid responses"
        self.version = version
        self.events.append(f"update {version}")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        self.events.append(f"generate {seed}")
        return self.answers(prompts, num_responses, seed)

    def start(self, prompts: Sequence[Prompt], *, num_responses: int, seed: int) -> None:
        assert self.started is None
        self.events.append(f"start {seed}")
        self.started = self.answers(prompts, num_responses, seed)

    def finish(self) -> list[Rollout]:
        assert self.started is not None
        rollouts, self.started = self.started, None
        self.events.append("finish")
        return rollouts

    def answers(self, prompts: Sequence[Prompt], num_responses: int, seed: int) -> list[Rollout]:
        return [
            Rollout(
                prompt=prompt,
                response_ids=[seed, sibling],
                rollout_log_probs=[0.0, 0.0],
                finish_reason="stop",
                policy_version=self.version,
            )
            for prompt in prompts
            for sibling in range(num_responses)
        ]


def test_the_next_step_is_generated_while_this_one_trains() -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    fleet = OneStepAhead(servers, stream, last_seed=103)
    expected = PromptStream(PROMPTS, seed=3)
    progress: list[None] = []
    for step in range(4):
        fleet.update_weights(iter([]), step)
        rollouts = fleet.generate(
            stream.take(4), num_responses=2, seed=100 + step, on_rollout=lambda: progress.append(None)
        )
        servers.events.append(f"train {step}")
        assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in expected.take(4) for _ in range(2)]
        assert [rollout.response_ids for rollout in rollouts] == [[100 + step, 0], [100 + step, 1]] * 4
        assert {rollout.policy_version for rollout in rollouts} == {max(0, step - 1)}
        assert fleet.metrics()["staleness/steps"] == min(step, 1)
    fleet.update_weights(iter([]), 4)
    assert stream.cursor == 16
    assert len(progress) == 3 * 8  # of the first step the servers report themselves
    assert servers.events == [
        *("update 0", "generate 100", "start 101", "train 0"),
        *("finish", "update 1", "start 102", "train 1"),
        *("finish", "update 2", "start 103", "train 2"),
        *("finish", "update 3", "train 3"),
        "update 4",
    ]


def test_other_prompts_than_expected_are_generated_now() -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    fleet = OneStepAhead(servers, stream, last_seed=103)
    fleet.update_weights(iter([]), 0)
    fleet.generate(stream.take(4), num_responses=2, seed=100)
    stream.take(1)
    fleet.update_weights(iter([]), 1)
    chosen = stream.take(4)
    rollouts = fleet.generate(chosen, num_responses=2, seed=101)
    assert [rollout.prompt for rollout in rollouts[::2]] == chosen
    assert {rollout.policy_version for rollout in rollouts} == {1}


def config(*, ppo: dict[str, Any], fleet: dict[str, Any]) -> Config:
    optimizer = OptimizerConfig(lr=1e-6)
    return Config(
        run_dir=Path("run"),
        policy=ModelConfig(path=Path("model"), optimizer=optimizer),
        critic=CriticConfig(path=Path("model"), optimizer=optimizer),
        ppo=PPOConfig(num_steps=1, **ppo),
        sampling=SamplingConfig(max_response_tokens=1024),
        data=DataConfig(train=(Path("train.jsonl"),)),
        fleet=FleetConfig(**fleet),
    )


@pytest.mark.parametrize(
    ("ppo", "fleet", "message"),
    [
        ({"max_staleness": 2}, {}, r"ppo\.max_staleness 2 is neither 0 nor 1"),
        ({"max_staleness": 1}, {"kind": "local"}, "needs servers that compute beside the trainer"),
        ({"max_staleness": 1}, {"colocated": True}, "needs servers that compute beside the trainer"),
        ({"max_staleness": 1, "oversampling": 0.5}, {}, "asks for prompts a step ahead"),
        ({"importance_cap": -1.0}, {}, r"ppo\.importance_cap -1\.0 is negative"),
        ({"oversampling": 0.5}, {"kind": "local"}, r"ppo\.oversampling 0\.5 needs servers"),
        ({}, {"kind": "local", "colocated": True}, r"fleet\.colocated is about servers"),
        ({}, {"urls": ("http://a:1",), "colocated": True}, r"fleet\.colocated needs servers that the run starts"),
        ({}, {"urls": ("http://a:1",), "num_servers": 2}, r"fleet\.num_servers 2 would start others"),
        ({}, {"urls": ("a:1",)}, r"holds 'a:1', which is no http:// or https:// address"),
        ({}, {"num_servers": 2, "min_servers": 3}, r"fleet\.min_servers 3 exceeds the 2 servers"),
        ({}, {"num_servers": 2, "server_tp": 2, "gpus": (0, 1)}, "names 2 GPUs, but 2 servers of 2 GPUs need 4"),
    ],
)
def test_combinations_without_sense_are_refused(ppo: dict[str, Any], fleet: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(ppo=ppo, fleet=fleet)
