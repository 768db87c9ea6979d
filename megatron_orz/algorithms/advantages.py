"""From log-probabilities and values to experience: advantages, their whitening over a step, and their quality.

Whatever spans data-parallel ranks goes through moments: [3] float64 tensors of (count, mean, M2), where M2 is the sum
of squared deviations from the mean. Moments of parts combine exactly into those of the whole, so the ranks exchange
three numbers. The caller brings the exchange: `all_gather` takes this rank's [3] and returns every rank's, [n, 3].
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_orz.ops.gae import packed_gae
from megatron_orz.types import Experience, PackedBatch

AllGather: TypeAlias = Callable[[Tensor], Tensor]

MIN_VARIANCE = 1e-8
"""Below it, advantages are centred but hardly scaled: what is left of them is rounding."""


def estimate(
    batches: Sequence[PackedBatch],
    old_log_probs: Sequence[Tensor],
    old_values: Sequence[Tensor],
    *,
    gamma: float,
    gae_lambda: float,
) -> list[Experience]:
    """Adds advantages and returns by GAE(gamma, lambda) to each pack; the advantages are not whitened.

    old_log_probs, old_values: a [T] float32 tensor for each batch.
    """
    experiences = []
    for batch, log_probs, values in zip(batches, old_log_probs, old_values, strict=True):
        advantages, returns = packed_gae(batch.rewards, values, batch.cu_seqlens, gamma=gamma, gae_lambda=gae_lambda)
        experiences.append(
            Experience.from_batch(
                batch, old_log_probs=log_probs, old_values=values, advantages=advantages, returns=returns
            )
        )
    return experiences


def whiten_advantages(experiences: Sequence[Experience], all_gather: AllGather) -> list[Experience]:
    """Shifts and scales the advantages of a step to mean 0 and variance 1 over the response tokens of all ranks."""
    moments = _global_moments(((e.advantages, e.loss_mask) for e in experiences), all_gather)
    return [replace(e, advantages=whiten(e.advantages, e.loss_mask, moments)) for e in experiences]


def explained_variance(experiences: Sequence[Experience], all_gather: AllGather) -> float:
    """1 - Var(R - V_old) / Var(R) over the response tokens of all ranks.

    1: the critic knew the returns; 0: as good as a constant; nan: the returns do not vary.
    """
    returns = _global_moments(((e.returns, e.loss_mask) for e in experiences), all_gather)
    errors = _global_moments(((e.returns - e.old_values, e.loss_mask) for e in experiences), all_gather)
    if _variance(returns) < MIN_VARIANCE:
        return float("nan")
    return 1.0 - (_variance(errors) / _variance(returns)).item()


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(count, mean, M2) of the entries of x under the mask: [3] float64; all 0 under an empty mask."""
    count = mask.sum().double()
    x = torch.where(mask, x.double(), 0.0)
    mean = x.sum() / count.clamp(min=1)
    return torch.stack([count, mean, torch.where(mask, x - mean, 0.0).square().sum()])


def combine_moments(moments: Tensor) -> Tensor:
    """Moments of a whole from those of its parts, [n, 3] -> [3] (Chan, Golub and LeVeque)."""
    counts, means, squares = moments.unbind(dim=1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return torch.stack([count, mean, (squares + counts * (means - mean).square()).sum()])


def whiten(x: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """(x - mean) / std under the mask, 0 outside: [T] of x's type."""
    mean = moments[1]
    whitened = (x.double() - mean) * _variance(moments).clamp(min=MIN_VARIANCE).rsqrt()
    return torch.where(mask, whitened, 0.0).to(x.dtype)


def _variance(moments: Tensor) -> Tensor:
    count, _, sum_of_squares = moments
    return sum_of_squares / count.clamp(min=1)


def _global_moments(parts: Iterable[tuple[Tensor, Tensor]], all_gather: AllGather) -> Tensor:
    """Moments of (x, mask) pairs over all ranks; a rank without any still takes part in the exchange."""
    moments = [masked_moments(x, mask) for x, mask in parts] or [torch.zeros(3, dtype=torch.float64)]
    return combine_moments(all_gather(combine_moments(torch.stack(moments))))
