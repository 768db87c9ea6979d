"""Truncated importance sampling: corrects for responses that another policy sampled than the one that is updated.

    r_t = pi_old(y_t | y_<t) / pi_rollout(y_t | y_<t)

    token       w_t = min(r_t, cap)
    sequence    w_t = min(prod_s r_s, cap), over all tokens s of the response, the same for each of them

pi_rollout is what sampled each token: an older policy, several of them where weights were swapped within the response,
or the same one, computed otherwise by a server. The weight of a sequence leaves the policy gradient unbiased, and its
variance grows with the length of the response. Weights of tokens ignore how likely the tokens before were, which is a
bias, and vary little. Truncation bounds the variance (Ionides, Truncated importance sampling, 2008); for rollouts of
inference servers see Yao et al., Your efficient RL framework secretly brings you off-policy RL training, 2025.
"""

import torch
from torch import Tensor

from megatron_orz.types import ImportanceLevel, PackedBatch

MAX_LOG_RATIO = 80.0
"""Ratios beyond exp(80) are those: their float32 numbers stay finite."""


def log_ratios(batch: PackedBatch, old_log_probs: Tensor, level: ImportanceLevel) -> Tensor:
    """The logarithm of the ratio that weighs each token, before truncation: [T] float32, 0 outside responses.

    old_log_probs: [T].
    """
    # Prompt tokens have no log-probability by a server: whatever stands there has no effect.
    ratios = torch.where(batch.loss_mask, old_log_probs - batch.rollout_log_probs, 0.0)
    if level == "sequence":
        lengths = batch.cu_seqlens.diff().long()
        sequence = torch.arange(len(lengths), device=ratios.device).repeat_interleave(lengths)
        sums = torch.zeros(len(lengths), dtype=torch.float64, device=ratios.device)
        sums.index_add_(0, sequence, ratios.double())
        ratios = torch.where(batch.loss_mask, sums[sequence].float(), 0.0)
    return ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def importance_weights(
    batch: PackedBatch, old_log_probs: Tensor, *, cap: float, level: ImportanceLevel
) -> Tensor | None:
    """min(ratio, cap) for each token: [T] float32, min(1, cap) outside responses. None without a cap."""
    return log_ratios(batch, old_log_probs, level).exp().clamp(max=cap) if cap else None
