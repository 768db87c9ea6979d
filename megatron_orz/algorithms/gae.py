"""Generalised advantage estimation and its variants: from the rewards and values of a pack to its advantages.

Each takes a pack and the values of its tokens, [T] float32, and returns advantages and returns, [T] float32, and the
moments of the advantages of its response tokens, [3] (`ops/moments.py`).
"""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_orz.ops.gae import packed_gae
from megatron_orz.ops.moments import combine_moments
from megatron_orz.types import PackedBatch

Advantages: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(advantages [T], returns [T], moments [3])"""


def gae(batch: PackedBatch, values: Tensor, *, gamma: float, gae_lambda: float) -> Advantages:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, R_t = A_t + V_t (Schulman et al., 2015); see `ops/gae.py`."""
    return packed_gae(batch.rewards, values, batch.cu_seqlens, batch.loss_mask, gamma=gamma, gae_lambda=gae_lambda)


def decoupled_gae(
    batch: PackedBatch, values: Tensor, *, gamma: float, gae_lambda: float, value_gae_lambda: float
) -> Advantages:
    """A by gae_lambda, R by value_gae_lambda (Yuan et al., What's Behind PPO's Collapse in Long-CoT, 2025).

    The policy may then have low variance while the critic learns from unbiased returns, those of lambda 1.
    """
    advantages, returns, moments = gae(batch, values, gamma=gamma, gae_lambda=gae_lambda)
    if value_gae_lambda != gae_lambda:
        _, returns, _ = gae(batch, values, gamma=gamma, gae_lambda=value_gae_lambda)
    return advantages, returns, moments


def length_adaptive_gae(
    batch: PackedBatch, values: Tensor, *, gamma: float, alpha: float, value_gae_lambda: float
) -> Advantages:
    """A with lambda = max(0, 1 - 1 / (alpha n)) for a response of n tokens (Yue et al., VAPO, 2025).

    The sum of the weights lambda^l is about alpha n, so that temporal-difference errors reach over the same share of
    every response. R is by value_gae_lambda, as in `decoupled_gae`.
    """
    num_response_tokens = F.pad(batch.loss_mask.cumsum(0), (1, 0))[batch.cu_seqlens].diff()
    lambdas = (1 - 1 / (alpha * num_response_tokens.clamp(min=1).double())).clamp(min=0.0)
    lengths = batch.cu_seqlens.diff().tolist()
    arrays = (x.split(lengths) for x in (batch.rewards, values, batch.loss_mask))
    advantages, parts = [], []
    for rewards, v, mask, gae_lambda in zip(*arrays, lambdas.tolist(), strict=True):
        bounds = torch.tensor([0, len(v)], dtype=torch.int32, device=v.device)
        of_sequence, _, moments = packed_gae(rewards, v, bounds, mask, gamma=gamma, gae_lambda=gae_lambda)
        advantages.append(of_sequence)
        parts.append(moments)
    _, returns, _ = gae(batch, values, gamma=gamma, gae_lambda=value_gae_lambda)
    return torch.cat(advantages), returns, combine_moments(torch.stack(parts))
