"""What a step's rollouts say of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from megatron_orz.types import Metrics, Rollout


def rollout_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Rewards, lengths and endings of a step's rollouts, all of which every rank knows."""
    grades = [rollout.grade for rollout in rollouts if rollout.grade is not None]
    rewards = [grade.reward for grade in grades]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/timed_out": float(sum(grade.timed_out for grade in grades)),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/format_share": fmean(grade.is_formatted for grade in grades),
        "response/truncated_share": fmean(rollout.finish_reason != "stop" for rollout in rollouts),
    }
