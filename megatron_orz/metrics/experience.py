"""What the estimates of a step say of the servers and of the critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_orz.algorithms.advantages import explained_variance
from megatron_orz.types import DataParallel, Experience, Metrics


def experience_metrics(experience: Sequence[Experience], ranks: DataParallel, *, has_critic: bool = True) -> Metrics:
    """How far the servers' log-probabilities are from the trainer's own, and how good the critic is, if any."""
    differences = torch.cat([_mismatch(e) for e in experience])
    count = torch.tensor(float(differences.numel()))
    largest = differences.max() if differences.numel() else torch.zeros(())
    parts = ranks.dp_all_gather(torch.stack([count, differences.sum(), largest]))
    metrics = {
        "log_prob_mismatch/mean": float(parts[:, 1].sum() / parts[:, 0].sum()),
        "log_prob_mismatch/max": float(parts[:, 2].max()),
    }
    if has_critic:
        metrics["critic/explained_variance"] = explained_variance(experience, ranks.dp_all_gather)
    return metrics


def _mismatch(experience: Experience) -> Tensor:
    """|log pi_rollout - log pi_old| of the response tokens."""
    return (experience.rollout_log_probs - experience.old_log_probs)[experience.loss_mask].abs()
