"""Held-out scores through the same fleet and verifier as training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from megatron_orz.logs import RunLog
from megatron_orz.types import Fleet, Grader, Metrics, Prompt, Rollout


def evaluate(
    held_out: Mapping[str, Sequence[Prompt]],
    fleet: Fleet,
    grader: Grader,
    *,
    num_responses: int,
    seed: int,
    log: RunLog,
) -> Metrics:
    """avg@k of each set of prompts, k = num_responses, by the policy the fleet holds.

    Returns `evaluation/<set>/avg@k`, `/format_share` and `/length_mean` for each set; nothing for no sets.
    """
    metrics: Metrics = {}
    for name, prompts in held_out.items():
        with log.progress(f"evaluate {name}", total=len(prompts) * num_responses) as advance:
            rollouts = fleet.generate(prompts, num_responses=num_responses, seed=seed, on_rollout=advance)
        for metric, value in _scores(grader.grade(rollouts), num_responses).items():
            metrics[f"evaluation/{name}/{metric}"] = value
    return metrics


def _scores(rollouts: Sequence[Rollout], num_responses: int) -> Metrics:
    grades = [rollout.grade for rollout in rollouts if rollout.grade is not None]
    return {
        # Every prompt has k responses, so the mean over prompts of the mean over responses is the plain mean.
        f"avg@{num_responses}": fmean(grade.reward for grade in grades),
        "format_share": fmean(grade.is_formatted for grade in grades),
        "length_mean": fmean(len(rollout.response_ids) for rollout in rollouts),
    }
