"""What the estimates of a step say of the servers and of the critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_orz.algorithms.advantages import explained_variance
from megatron_orz.ops.moments import combine_moments
from megatron_orz.types import DataParallel, Experience, Metrics


def experience_metrics(
    experience: Sequence[Experience], moments: Tensor, ranks: DataParallel, *, has_critic: bool
) -> Metrics:
    """How far the servers' log-probabilities are from the trainer's own, and how good the critic is, if there is one.

    moments: [3] float64, those of this rank's advantages before whitening, from `estimate`. Collective.
    """
    mismatch = torch.cat([(e.rollout_log_probs - e.old_log_probs)[e.loss_mask].abs() for e in experience]).double()
    num_positive = sum(int((e.advantages[e.loss_mask] > 0).sum()) for e in experience)
    largest = mismatch.max() if len(mismatch) else torch.zeros((), dtype=torch.float64)
    parts = torch.stack([mismatch.sum(), largest, torch.tensor(float(num_positive), dtype=torch.float64), *moments])
    gathered = ranks.dp_all_gather(parts)  # [dp_size, 6]
    num_tokens, mean, sum_of_squares = combine_moments(gathered[:, 3:]).tolist()
    metrics = {
        "log_prob_mismatch/mean": float(gathered[:, 0].sum()) / num_tokens,
        "log_prob_mismatch/max": float(gathered[:, 1].max()),
        "advantage/mean": mean,
        "advantage/std": (sum_of_squares / num_tokens) ** 0.5,
        "advantage/positive_share": float(gathered[:, 2].sum()) / num_tokens,
    }
    if has_critic:
        metrics["critic/explained_variance"] = explained_variance(experience, ranks.dp_all_gather)
    return metrics
