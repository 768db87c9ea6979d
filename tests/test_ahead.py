"""What is asked when, and which policy answers, when the fleet works a step ahead of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.ahead import GenerationAhead
from megatron_orz.answers import Answers
from megatron_orz.checkpoint.manifest import Progress
from megatron_orz.checkpoint.store import CheckpointStore
from megatron_orz.config import (
    CheckpointConfig,
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
from megatron_orz.ranks import Ranks
from megatron_orz.types import NamedWeights, Prompt, Rollout, Swap

PROMPTS = [Prompt(prompt_id=number, token_ids=[number], answer="", source="test") for number in range(10)]


class UnderWay:
    """What the servers were asked for."""

    def __init__(
        self, servers: Servers, prompts: Sequence[Prompt], num_responses: int, seed: int, answers: Answers
    ) -> None:
        self.servers, self.prompts, self.num_responses = servers, list(prompts), num_responses
        self.seed, self.answers = seed, answers

    def answer(self, share: float) -> None:
        """Answers this share of what is not answered, by the weights of this moment."""
        open_places = [place for place in range(len(self.prompts)) if place not in self.answers]
        for place in open_places[: round(share * len(open_places))]:
            self.servers.asked.append((self.seed, place))
            self.answers[place] = [
                Rollout(
                    prompt=self.prompts[place],
                    response_ids=[self.seed, sibling, 5],
                    rollout_log_probs=[-0.5, 0.0, -0.25],
                    finish_reason="stop",
                    policy_version=self.servers.version,
                )
                for sibling in range(self.num_responses)
            ]

    def result(self) -> list[Rollout]:
        if len(self.answers) < len(self.prompts):
            self.answer(1.0)
        self.servers.events.append(f"result {self.seed}")
        return [rollout for _, siblings in sorted(self.answers.items()) for rollout in siblings]


class Servers:
    """Answers with the seed: half of what is under way by the weights that an update replaces, the rest when waited
    for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.asked: list[tuple[int, int]] = []
        self.under_way: list[UnderWay] = []
        self.version = -1

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        for under_way in self.under_way:
            under_way.answer(0.5)
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
        raise AssertionError("what is generated ahead is begun by start")

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        answers: Answers,
        on_rollout: Callable[[], None] | None = None,
    ) -> UnderWay:
        self.events.append(f"start {seed}")
        self.under_way.append(UnderWay(self, prompts, num_responses, seed, answers))
        return self.under_way[-1]


def run_steps(ahead: GenerationAhead, stream: PromptStream, servers: Servers, steps: range) -> list[list[Rollout]]:
    """As the loop does it."""
    trained = []
    for step in steps:
        ahead.update_weights(iter([]), step)
        trained.append(ahead.generate(stream.take(4), num_responses=2, seed=100 + step))
        servers.events.append(f"train {step}")
    return trained


def everything(num_steps: int) -> list[tuple[Prompt, list[int]]]:
    """Prompt and response of every rollout that steps are to be trained on."""
    stream = PromptStream(PROMPTS, seed=3)
    return [
        (prompt, [100 + step, sibling, 5])
        for step in range(num_steps)
        for prompt in stream.take(4)
        for sibling in range(2)
    ]


def contents(trained: list[list[Rollout]]) -> list[tuple[Prompt, list[int]]]:
    return [(rollout.prompt, rollout.response_ids) for rollouts in trained for rollout in rollouts]


def test_the_next_step_is_generated_while_this_one_trains() -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=1, last_seed=103)
    trained = run_steps(ahead, stream, servers, range(4))
    assert contents(trained) == everything(4)
    for step, rollouts in enumerate(trained):
        assert {rollout.policy_version for rollout in rollouts} == {max(0, step - 1)}
    assert ahead.metrics()["staleness/max"] == ahead.metrics()["staleness/mean"] == 1
    assert stream.cursor == 16
    assert servers.events == [
        *("update 0", "start 100", "start 101", "result 100", "train 0"),
        *("result 101", "update 1", "start 102", "train 1"),
        *("result 102", "update 2", "start 103", "train 2"),
        *("result 103", "update 3", "train 3"),
    ]


def test_weights_that_swap_within_responses_wait_for_none() -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=1, last_seed=102, waits_for_responses=False)
    assert contents(run_steps(ahead, stream, servers, range(3))) == everything(3)
    assert servers.events == [
        *("update 0", "start 100", "start 101", "result 100", "train 0"),
        *("update 1", "start 102", "result 101", "train 1"),
        *("update 2", "result 102", "train 2"),
    ]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("max_staleness", [2, 3])
def test_no_token_is_older_than_allowed(max_staleness: int, waits: bool) -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=max_staleness, last_seed=109, waits_for_responses=waits)
    trained = run_steps(ahead, stream, servers, range(10))
    assert contents(trained) == everything(10)
    ages = [{step - rollout.policy_version for rollout in rollouts} for step, rollouts in enumerate(trained)]
    assert max(map(max, ages)) == max_staleness, "the bound is made use of"
    assert len(ages[-1]) > 1, "a step has rollouts of several versions"
    last = [9 - rollout.policy_version for rollout in trained[-1]]
    assert ahead.metrics()["staleness/mean"] == pytest.approx(sum(last) / len(last))
    assert ahead.metrics()["staleness/max"] == max(last)


def test_staleness_is_that_of_tokens() -> None:
    class Swapping(Servers):
        def start(self, prompts: Sequence[Prompt], **order: Any) -> UnderWay:
            under_way = super().start(prompts, **order)
            under_way.answers |= {
                place: [
                    Rollout(
                        prompt=prompt,
                        response_ids=[1] * 8,
                        rollout_log_probs=[0.0] * 8,
                        finish_reason="stop",
                        policy_version=1,
                        swaps=(Swap(2, 3), Swap(7, 4)) if place else (),
                    )
                ]
                for place, prompt in enumerate(prompts)
            }
            return under_way

    stream = PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(Swapping(), stream, max_staleness=3, last_seed=0)
    ahead.update_weights(iter([]), 4)
    ahead.generate(stream.take(2), num_responses=1, seed=0)
    metrics = ahead.metrics()
    assert metrics["staleness/mean"] == (8 * 3 + 2 * 3 + 5 * 1 + 1 * 0) / 16
    assert metrics["staleness/max"] == 3
    assert metrics["staleness/swapped_share"] == 0.5


def test_every_rollout_is_told_of_once_whenever_it_was_finished() -> None:
    class Telling(Servers):
        def start(self, prompts: Sequence[Prompt], *, on_rollout: Any = None, **order: Any) -> UnderWay:
            under_way = super().start(prompts, **order)
            under_way.answer(0.5)
            for _ in range(4):
                on_rollout()
            under_way.result = lambda: [on_rollout() for _ in range(4)] and UnderWay.result(under_way)  # type: ignore
            return under_way

    servers, stream = Telling(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=1, last_seed=101)
    for step in range(2):
        told: list[None] = []
        ahead.update_weights(iter([]), step)
        ahead.generate(stream.take(4), num_responses=2, seed=100 + step, on_rollout=lambda: told.append(None))  # noqa: B023
        assert len(told) == 8


def test_other_prompts_than_expected_are_generated_now() -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=2, last_seed=103)
    ahead.update_weights(iter([]), 0)
    ahead.generate(stream.take(4), num_responses=2, seed=100)
    stream.take(1)
    ahead.update_weights(iter([]), 1)
    chosen = stream.take(4)
    rollouts = ahead.generate(chosen, num_responses=2, seed=101)
    assert [rollout.prompt for rollout in rollouts[::2]] == chosen
    assert {rollout.policy_version for rollout in rollouts} == {1}


def checkpoints(path: Path) -> CheckpointStore:
    return CheckpointStore(path, CheckpointConfig(), recipe={}, ranks=Ranks())


def test_a_run_that_goes_on_trains_on_every_rollout_once_and_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=3, last_seed=107)
    trained = run_steps(ahead, stream, servers, range(3))
    store = checkpoints(tmp_path)
    store.save(Progress(step=3, prompt_cursor=stream.cursor, metrics_bytes=0), {"ahead": ahead}, sources={})
    answered = [(order.seed, place) for order in servers.under_way for place in order.answers if order.seed > 102]
    run_steps(ahead, stream, servers, range(3, 5))  # what the killed run did afterwards is lost
    store.wait()

    after, stream = Servers(), PromptStream(PROMPTS, seed=3, cursor=12)
    going_on = GenerationAhead(after, stream, max_staleness=3, last_seed=107)
    manifest = checkpoints(tmp_path).newest_sound(print)
    assert manifest is not None
    assert sorted(manifest.files) == [f"ahead/{seed}.npz" for seed in sorted({seed for seed, _ in answered})]
    checkpoints(tmp_path).restore(manifest, {"ahead": going_on})
    trained += run_steps(going_on, stream, after, range(3, 8))
    assert contents(trained) == everything(8)
    assert 0 < len(answered) < 12
    assert sorted(answered + after.asked) == [(seed, place) for seed in range(103, 108) for place in range(4)]
    kept = [rollout for rollouts in trained[3:] for rollout in rollouts if rollout.policy_version < 3]
    assert len(kept) == 2 * len(answered), "answers of before the checkpoint keep their versions"


def test_saved_rollouts_of_other_prompts_are_refused(tmp_path: Path) -> None:
    servers, stream = Servers(), PromptStream(PROMPTS, seed=3)
    ahead = GenerationAhead(servers, stream, max_staleness=1, last_seed=107)
    run_steps(ahead, stream, servers, range(1))
    servers.under_way[-1].answer(1.0)
    assert ahead.save_state(tmp_path, copy=True).write() == [tmp_path / "101.npz"]
    other = PromptStream(PROMPTS, seed=4, cursor=4)
    going_on = GenerationAhead(Servers(), other, max_staleness=1, last_seed=107)
    going_on.load_state(tmp_path)
    going_on.update_weights(iter([]), 1)
    with pytest.raises(ValueError, match="holds rollouts of other prompts"):
        going_on.generate(other.take(4), num_responses=2, seed=101)


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
        ({"max_staleness": -1}, {}, r"ppo\.max_staleness -1 is negative"),
        ({}, {"swaps_within_responses": True}, r"ppo\.max_staleness 0 waits for all of them"),
        ({"max_staleness": 1}, {"kind": "sglang", "swaps_within_responses": True}, "which fleet.kind sglang does not"),
        ({}, {"kind": "sglang", "verification": "full"}, "full reads every tensor back, and SGLang's"),
        ({"max_staleness": 1}, {"kind": "local"}, "needs servers that compute beside the trainer"),
        ({"max_staleness": 1}, {"colocated": True}, "needs servers that compute beside the trainer"),
        ({"max_staleness": 1, "oversampling": 0.5}, {}, "asks for prompts steps ahead"),
        ({"importance_level": "sequence"}, {}, r"ppo\.importance_level sequence is about weights"),
        ({"importance_cap": -1.0}, {}, r"ppo\.importance_cap -1\.0 is negative"),
        ({"oversampling": 0.5}, {"kind": "local"}, r"ppo\.oversampling 0\.5 needs servers"),
        ({}, {"kind": "local", "colocated": True}, r"fleet\.colocated is about servers"),
        ({}, {"urls": ("http://a:1",), "colocated": True}, r"fleet\.colocated needs servers that the run starts"),
        ({}, {"urls": ("http://a:1",), "num_servers": 2}, r"fleet\.num_servers 2 would start others"),
        ({}, {"urls": ("a:1",)}, r"holds 'a:1', which is no http:// or https:// address"),
        ({}, {"num_servers": 2, "min_servers": 3}, r"fleet\.min_servers 3 exceeds the 2 servers"),
        ({}, {"num_servers": 2, "server_tp": 2, "gpus": (0, 1)}, "names 2 GPUs, but 2 servers of 2 GPUs need 4"),
        ({}, {"num_servers": 2, "gpus": (0, 0)}, r"fleet\.gpus \(0, 0\) are not different numbers from 0 on"),
        ({}, {"gpus": (-1,)}, r"fleet\.gpus \(-1,\) are not different numbers from 0 on"),
    ],
)
def test_combinations_without_sense_are_refused(ppo: dict[str, Any], fleet: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(ppo=ppo, fleet=fleet)
