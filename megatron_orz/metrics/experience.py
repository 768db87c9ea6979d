"""What the estimates of a step say of the servers and of the critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_orz.algorithms.advantages import explained_variance
from megatron_orz.types import DataParallel, Experience, Metrics


def experience_metrics(experience: Sequence[Experience], ranks: DataParallel) -> Metrics:
    """How far the servers' log-probabilities are from the trainer's own, and how good the critic is."""
    differences = torch.cat([_mismatch(e) for e in experience])
    count = torch.tensor(float(differences.numel()))
    largest = differences.max() if differences.numel() else torch.zeros(())
    parts = ranks.dp_all_gather(torch.stack([count, differences.sum(), largest]))
    return {
        "log_prob_mismatch/mean": float(parts[:, 1].sum() / parts[:, 0].sum()),
        "log_prob_mismatch/max": float(parts[:, 2].max()),
        "critic/explained_variance": explained_variance(experience, ranks.dp_all_gather),
    }


def _mismatch(experience: Experience) -> Tensor:
    """|log pi_rollout - log pi_old| of the response tokens."""
    return (experience.rollout_log_probs - experience.old_log_probs)[experience.loss_mask].abs()
