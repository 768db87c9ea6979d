"""Held-out scores against their definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from megatron_orz.evaluate import evaluate
from megatron_orz.logs import RunLog
from megatron_orz.types import Grade, NamedWeights, Prompt, Rollout

NUM_RESPONSES = 3
# Prompt -> for each of its responses the length, whether it is formatted, and the reward.
SUMS = {0: [(4, True, 1.0), (2, True, 0.0), (9, False, 0.0)], 1: [(5, True, 1.0), (5, True, 1.0), (1, True, 0.0)]}
PRODUCTS = {7: [(8, True, 0.0), (3, False, 0.0), (3, True, 1.0)]}
VERDICTS = SUMS | PRODUCTS


def prompts(table: dict[int, list[tuple[int, bool, float]]]) -> list[Prompt]:
    return [Prompt(prompt_id=number, token_ids=[1], answer="", source="test") for number in table]


class TableFleet:
    """Answers prompt n as the table says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int, int]] = []

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        pytest.fail("evaluation takes the weights that the fleet holds")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        self.calls.append(([prompt.prompt_id for prompt in prompts], num_responses, seed))
        return [
            Rollout(
                prompt=prompt,
                response_ids=[sibling] * VERDICTS[prompt.prompt_id][sibling][0],
                rollout_log_probs=[0.0] * VERDICTS[prompt.prompt_id][sibling][0],
                finish_reason="stop",
                policy_version=0,
            )
            for prompt in prompts
            for sibling in range(num_responses)
        ]


class TableGrader:
    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        graded = []
        for rollout in rollouts:
            _, is_formatted, reward = VERDICTS[rollout.prompt.prompt_id][rollout.response_ids[0]]
            grade = Grade(
                reward=reward, is_correct=True, is_formatted=is_formatted, timed_out=False, extracted="whatever"
            )
            graded.append(replace(rollout, grade=grade))
        return graded


def quiet_log() -> RunLog:
    return RunLog(Path("none"), num_steps=1, is_main=False)


def test_avg_at_k_is_the_mean_over_prompts_of_the_mean_reward_of_k_responses() -> None:
    fleet = TableFleet()
    held_out = {"sums": prompts(SUMS), "products": prompts(PRODUCTS)}
    metrics = evaluate(held_out, fleet, TableGrader(), num_responses=NUM_RESPONSES, seed=5, log=quiet_log())

    assert fleet.calls == [([0, 1], NUM_RESPONSES, 5), ([7], NUM_RESPONSES, 5)]
    expected = {}
    for name, table in (("sums", SUMS), ("products", PRODUCTS)):
        expected[f"evaluation/{name}/avg@3"] = fmean(fmean(reward for *_, reward in row) for row in table.values())
        responses = [response for row in table.values() for response in row]
        expected[f"evaluation/{name}/format_share"] = sum(formatted for _, formatted, _ in responses) / len(responses)
        expected[f"evaluation/{name}/length_mean"] = sum(length for length, *_ in responses) / len(responses)
    assert metrics == pytest.approx(expected)
    assert metrics["evaluation/sums/avg@3"] == pytest.approx(1 / 2)


def test_no_held_out_data_costs_nothing() -> None:
    fleet = TableFleet()
    assert evaluate({}, fleet, TableGrader(), num_responses=4, seed=0, log=quiet_log()) == {}
    assert fleet.calls == []
