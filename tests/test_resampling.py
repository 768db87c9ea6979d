"""Groups and prompts that are replaced: what is trained on, where it comes from, and when the search for it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from megatron_orz.config import PPOConfig
from megatron_orz.data.prompts import PromptStream
from megatron_orz.resampling import DynamicSampling, Oversampling
from megatron_orz.types import Grade, NamedWeights, Prompt, Rollout

PROMPTS = [Prompt(prompt_id=number, token_ids=[number], answer="", source="test") for number in range(100)]
NUM_RESPONSES = 4


class Echo:
    """Answers with the prompt, the sibling and the seed; the first to be answered are the last asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        raise NotImplementedError

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        self.asked.append(([prompt.prompt_id for prompt in prompts], seed))
        return [
            Rollout(
                prompt=prompt,
                response_ids=[sibling, seed],
                rollout_log_probs=[0.0, 0.0],
                finish_reason="stop",
                policy_version=0,
            )
            for prompt in prompts
            for sibling in range(num_responses)
        ]

    def generate_first(
        self,
        prompts: Sequence[Prompt],
        *,
        num_groups: int,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        return self.generate(prompts, num_responses=num_responses, seed=seed)[-num_groups * num_responses :]


class ModuloGrader:
    """Right are: no response to every third prompt, all to those that follow them, else the even siblings."""

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        graded = []
        for rollout in rollouts:
            kind, sibling = rollout.prompt.prompt_id % 3, rollout.response_ids[0]
            reward = [0.0, 1.0, float(sibling % 2 == 0)][kind]
            grade = Grade(reward=reward, is_correct=reward == 1, is_formatted=True, timed_out=False, extracted=None)
            graded.append(replace(rollout, grade=grade))
            if on_grade is not None:
                on_grade()
        return graded


def dynamic_sampling(fleet: Echo, prompts: PromptStream, *, max_rounds: int) -> DynamicSampling:
    return DynamicSampling(ModuloGrader(), fleet, prompts, num_responses=NUM_RESPONSES, max_rounds=max_rounds, seed=7)


def ids_of_groups(rollouts: Sequence[Rollout]) -> list[int]:
    """The prompt of each group; siblings must be adjacent and in order."""
    groups = [rollouts[start : start + NUM_RESPONSES] for start in range(0, len(rollouts), NUM_RESPONSES)]
    for group in groups:
        assert len({rollout.prompt.prompt_id for rollout in group}) == 1
        assert [rollout.response_ids[0] for rollout in group] == list(range(NUM_RESPONSES))
    return [group[0].prompt.prompt_id for group in groups]


def test_uninformative_groups_are_replaced_until_the_step_is_full() -> None:
    fleet, stream = Echo(), PromptStream(PROMPTS, seed=0)
    chosen = stream.take(12)
    rollouts = fleet.generate(chosen, num_responses=NUM_RESPONSES, seed=1)
    sampling = dynamic_sampling(fleet, stream, max_rounds=50)
    graded: list[None] = []
    kept = ids_of_groups(sampling.grade(rollouts, on_grade=lambda: graded.append(None)))
    assert len(kept) == 12
    assert {prompt_id % 3 for prompt_id in kept} == {2}
    drawn = [prompt_id for asked, _ in fleet.asked for prompt_id in asked]
    # Everything drawn comes from the stream, each prompt once, and nothing informative was left out.
    assert drawn == [prompt.prompt_id for prompt in PromptStream(PROMPTS, seed=0).take(len(drawn))]
    assert kept == [prompt_id for prompt_id in drawn if prompt_id % 3 == 2]
    assert stream.cursor == len(drawn)
    assert len({seed for _, seed in fleet.asked}) == len(fleet.asked), "rounds share a seed"
    assert len(graded) == len(rollouts)
    metrics = sampling.metrics()
    assert metrics["resampling/drawn_groups"] == len(drawn)
    assert metrics["resampling/informative_share"] == pytest.approx(12 / len(drawn))
    assert metrics["resampling/rounds"] == len(fleet.asked) - 1
    assert metrics["resampling/filled_groups"] == 0
    means = [[0.0, 1.0, 0.5][prompt_id % 3] for prompt_id in drawn]
    assert metrics["resampling/drawn_reward_mean"] == pytest.approx(sum(means) / len(means))


def test_the_search_ends_and_the_step_is_filled_up() -> None:
    uninformative = [prompt for prompt in PROMPTS if prompt.prompt_id % 3 != 2]
    fleet, stream = Echo(), PromptStream(uninformative, seed=0)
    rollouts = fleet.generate(stream.take(5), num_responses=NUM_RESPONSES, seed=1)
    sampling = dynamic_sampling(fleet, stream, max_rounds=2)
    assert ids_of_groups(sampling.grade(rollouts)) == fleet.asked[0][0]
    assert [len(asked) for asked, _ in fleet.asked] == [5, 5, 5]
    assert sampling.metrics()["resampling/filled_groups"] == 5


def test_a_step_without_uninformative_groups_stays_as_it_is() -> None:
    informative = [prompt for prompt in PROMPTS if prompt.prompt_id % 3 == 2]
    fleet, stream = Echo(), PromptStream(informative, seed=0)
    rollouts = fleet.generate(stream.take(5), num_responses=NUM_RESPONSES, seed=1)
    assert dynamic_sampling(fleet, stream, max_rounds=2).grade(rollouts) == ModuloGrader().grade(rollouts)
    assert len(fleet.asked) == 1
    assert stream.cursor == 5


def test_more_prompts_are_asked_than_needed_and_the_last_ones_dropped() -> None:
    fleet, stream = Echo(), PromptStream(PROMPTS, seed=0)
    order = [prompt.prompt_id for prompt in PromptStream(PROMPTS, seed=0).take(20)]
    oversampling = Oversampling(fleet, stream, share=0.3)
    kept = oversampling.generate(stream.take(5), num_responses=NUM_RESPONSES, seed=1)
    assert fleet.asked == [(order[:7], 1)]
    assert ids_of_groups(kept) == order[2:7]
    oversampling.generate(stream.take(5), num_responses=NUM_RESPONSES, seed=2)
    assert fleet.asked[1] == (order[7:14], 2)
    assert oversampling.metrics() == {"resampling/dropped_prompts": 4.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversampling": -0.5}, r"ppo\.oversampling -0\.5 is negative"),
        ({"max_resampling_rounds": -1}, r"ppo\.max_resampling_rounds -1 is negative"),
        ({"max_resampling_rounds": 2, "num_responses": 1}, r"compares siblings: it needs ppo\.num_responses > 1"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(num_steps=1, **options)
