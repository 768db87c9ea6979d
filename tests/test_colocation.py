"""Who holds memory when: the order of calls in steps of the real loop, with models and a fleet that keep a diary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_orz.colocation import ColocatedFleet, ColocatedModel, ColocatedPolicy, ColocatedReference, Turns
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    FleetConfig,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.logs import RunLog
from megatron_orz.rollout.fleet import ServerFleet
from megatron_orz.types import Metrics, NamedWeights, Prompt, Rollout


class Diary:
    """Fleet and models at once; refuses what would not fit into memory."""

    def __init__(self, *models: str) -> None:
        self.entries: list[str] = []
        self.server: set[str] = set()
        self.models, self.loaded = set(models), set(models)

    def sleep(self) -> None:
        assert self.loaded == set()
        self.server.clear()
        self.entries.append("sleep")

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        assert what == "weights" or self.loaded == set(), "cache and trainer do not fit together"
        self.server.add(what)
        self.entries.append(f"wake {what}")

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        assert self.server == {"weights"}
        assert self.loaded == self.models
        self.entries.append(f"update {version} {next(iter(weights))[0]}")

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Rollout]:
        assert self.server == {"weights", "kv_cache"}
        self.entries.append("generate")
        return []


class Model:
    def __init__(self, name: str, diary: Diary) -> None:
        self.name, self.diary = name, diary

    def offload(self) -> Metrics:
        self.diary.loaded.remove(self.name)
        self.diary.entries.append(f"offload {self.name}")
        return {f"{self.name}/offloaded_gib": 1.0}

    def reload(self) -> None:
        assert self.diary.server == set(), "the servers still hold memory"
        self.diary.loaded.add(self.name)
        self.diary.entries.append(f"reload {self.name}")

    def infer(self, batches: Sequence[Any]) -> list[Any]:
        return self.work("infer", list(batches))

    def step(self, minibatch: Sequence[Any], loss: Any) -> Any:
        return self.work("step", {})

    def hf_weights(self) -> Any:
        return self.work("export", iter([("weight", None)]))

    def step_on_policy(self, minibatch: Sequence[Any], loss: Any) -> Any:
        return self.work("step", ({}, []))

    def refresh(self, step: int) -> None:
        self.work("refresh", None)

    def work(self, what: str, result: Any) -> Any:
        assert self.diary.server == set()
        assert self.diary.loaded == self.diary.models
        self.diary.entries.append(f"{what} {self.name}")
        return result


def test_trainer_and_servers_take_turns() -> None:
    diary = Diary("policy", "critic")
    models = Model("policy", diary), Model("critic", diary)
    turns = Turns(diary, models)
    fleet = ColocatedFleet(diary, turns)
    policy, critic = ColocatedPolicy(models[0], turns), ColocatedModel[Any](models[1], turns)
    with pytest.raises(AssertionError, match="an update comes first"):
        fleet.generate([], num_responses=1, seed=0)
    expected = []
    for version in range(2):
        fleet.update_weights(policy.hf_weights(), version)
        fleet.generate([], num_responses=1, seed=0)
        fleet.generate([], num_responses=1, seed=0)
        policy.infer([])
        critic.infer([])
        critic.step([], None)
        policy.step([], None)
        expected += [
            *("export policy", "wake weights", f"update {version} weight"),
            *("offload policy", "offload critic", "wake kv_cache", "generate", "generate"),
            *("sleep", "reload policy", "reload critic"),
            *("infer policy", "infer critic", "step critic", "step policy"),
        ]
    assert diary.entries == expected
    assert turns.metrics()["critic/offloaded_gib"] == 1.0
    assert turns.metrics()["colocation/switch_s"] > 0


def test_an_export_after_the_last_update_brings_the_trainer_back() -> None:
    diary = Diary("policy", "critic")
    models = Model("policy", diary), Model("critic", diary)
    turns = Turns(diary, models)
    policy = ColocatedPolicy(models[0], turns)
    ColocatedFleet(diary, turns).update_weights(policy.hf_weights(), 0)
    policy.hf_weights()
    assert diary.entries[-4:] == ["sleep", "reload policy", "reload critic", "export policy"]


def test_a_reference_finds_the_policy_when_it_follows_it() -> None:
    """The loop refreshes the reference before anything else is asked of the trainer."""
    diary = Diary("policy", "critic", "reference")
    models = [Model(name, diary) for name in ("policy", "critic", "reference")]
    turns = Turns(diary, models)
    policy, reference = ColocatedPolicy(models[0], turns), ColocatedReference(models[2], turns)
    ColocatedFleet(diary, turns).update_weights(policy.hf_weights(), 3)
    reference.refresh(3)
    reference.infer([])
    assert diary.entries[-5:] == [*(f"reload {model.name}" for model in models), "refresh reference", "infer reference"]


class Servers(Diary, ServerFleet):
    """A fleet of the kind that takes turns."""


def test_whatever_a_run_asks_of_a_model_comes_in_the_trainers_turn() -> None:
    from megatron_orz.assembly import Models, in_turns  # imports megatron-core

    like = {"path": Path("model"), "optimizer": OptimizerConfig(lr=1e-6)}
    config = Config(
        run_dir=Path("run"),
        policy=ModelConfig(**like),
        critic=CriticConfig(**like),
        ppo=PPOConfig(num_steps=1),
        kl=KLConfig(coefficient=0.1, reference=Path("model")),
        sampling=SamplingConfig(max_response_tokens=64),
        data=DataConfig(train=(Path("train.jsonl"),)),
        fleet=FleetConfig(colocated=True),
    )
    servers: Any = Servers("policy", "critic", "reference")
    models: Any = Models(**{name: Model(name, servers) for name in sorted(servers.models)})
    log = RunLog(Path("run"), num_steps=1, is_main=False)
    policy, critic, reference, fleet = in_turns(config, models, servers, servers, log)
    for ask in (
        *(lambda: policy.infer([]), lambda: policy.step([], None), lambda: policy.step_on_policy([], None)),
        *(lambda: critic.infer([]), lambda: critic.step([], None)),
        *(lambda: reference.infer([]), lambda: reference.refresh(1)),
    ):
        fleet.update_weights(policy.hf_weights(), 0)
        fleet.generate([], num_responses=1, seed=0)
        assert servers.loaded == set()
        ask()
        assert servers.loaded == servers.models
