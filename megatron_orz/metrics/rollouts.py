"""What a step's rollouts say of the policy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean, pstdev

from megatron_orz.metrics.traits import REFLECTION_PATTERNS, Traits
from megatron_orz.types import Grade, Metrics, Rollout


def rollout_metrics(rollouts: Sequence[Rollout], traits: Sequence[Traits]) -> Metrics:
    """Rewards, lengths, endings and traits of a step's graded rollouts, siblings adjacent; lengths in tokens.

    A mean over no responses, such as the length of right ones where none is right, is nan.
    """
    grades = _grades(rollouts)
    rewards = [grade.reward for grade in grades]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    of_correct = [(n, t) for n, t, grade in zip(lengths, traits, grades, strict=True) if grade.is_correct]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/pass@n": pass_at_n(rollouts),
        "reward/timed_out": float(sum(grade.timed_out for grade in grades)),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        **{f"response/{name}_length_mean": _mean(values) for name, values in lengths_by_answer(rollouts).items()},
        "response/correct_reflection_length_mean": _mean(n for n, t in of_correct if t.reflection),
        "response/format_share": fmean(grade.is_formatted for grade in grades),
        "response/truncated_share": fmean(rollout.finish_reason != "stop" for rollout in rollouts),
        "response/repetition_mean": fmean(t.repetition for t in traits),
        "response/reflection_share": fmean(bool(t.reflection) for t in traits),
        **{
            f"reflection/{pattern.rstrip(',')}_share": fmean(pattern in t.reflection for t in traits)
            for pattern in REFLECTION_PATTERNS
        },
    }


def pass_at_n(rollouts: Sequence[Rollout]) -> float:
    """The share of prompts that have a reward for at least one of their n responses."""
    groups = groupby(rollouts, key=lambda rollout: rollout.prompt.prompt_id)
    return fmean(any(grade.reward > 0 for grade in _grades(siblings)) for _, siblings in groups)


def lengths_by_answer(rollouts: Sequence[Rollout]) -> Mapping[str, list[int]]:
    """Response lengths of `correct` and `wrong` answers, however the response ended."""
    lengths: dict[str, list[int]] = {"correct": [], "wrong": []}
    for rollout, grade in zip(rollouts, _grades(rollouts), strict=True):
        lengths["correct" if grade.is_correct else "wrong"].append(len(rollout.response_ids))
    return lengths


def _grades(rollouts: Iterable[Rollout]) -> list[Grade]:
    grades = [rollout.grade for rollout in rollouts]
    assert None not in grades, "metrics are of graded rollouts"
    return [grade for grade in grades if grade is not None]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return fmean(values) if values else math.nan
