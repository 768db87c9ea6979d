"""From log-probabilities and values to experience: advantages, their whitening over a step, and their quality.

Whatever spans data-parallel ranks goes through moments (`ops/moments.py`), so the ranks exchange three numbers. The
caller brings the exchange: `all_gather` takes this rank's [3] and returns every rank's, [n, 3].
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_orz.algorithms.gae import Advantages
from megatron_orz.ops.moments import combine_moments, masked_moments
from megatron_orz.types import Experience, PackedBatch

Estimator: TypeAlias = Callable[[PackedBatch, Tensor], Advantages]
"""(pack, values [T]) -> advantages, returns, moments: one of `gae.py`, with its arguments."""
Importance: TypeAlias = Callable[[PackedBatch, Tensor], Tensor | None]
"""(pack, old_log_probs [T]) -> weights [T], if any: `importance.importance_weights`, with its arguments."""
AllGather: TypeAlias = Callable[[Tensor], Tensor]

MIN_VARIANCE = 1e-8
"""Below it, advantages are centred but hardly scaled: what is left of them is rounding."""


def estimate(
    batches: Sequence[PackedBatch],
    old_log_probs: Sequence[Tensor],
    old_values: Sequence[Tensor],
    ref_log_probs: Sequence[Tensor],
    *,
    estimator: Estimator,
    importance: Importance = lambda batch, old_log_probs: None,
) -> tuple[list[Experience], Tensor]:
    """Adds advantages, returns and importance weights to each pack; the advantages are not whitened.

    old_log_probs, old_values, ref_log_probs: a [T] float32 tensor for each batch. The second result, [3], holds the
    moments of the advantages of all response tokens.
    """
    experiences, parts = [], []
    for batch, log_probs, values, of_reference in zip(batches, old_log_probs, old_values, ref_log_probs, strict=True):
        advantages, returns, moments = estimator(batch, values)
        parts.append(moments)
        experiences.append(
            Experience.from_batch(
                batch,
                old_log_probs=log_probs,
                old_values=values,
                ref_log_probs=of_reference,
                advantages=advantages,
                returns=returns,
                importance_weights=importance(batch, log_probs),
            )
        )
    return experiences, _whole(parts)


def whiten_advantages(experiences: Sequence[Experience], moments: Tensor, all_gather: AllGather) -> list[Experience]:
    """Shifts and scales the advantages of a step to mean 0 and variance 1 over the response tokens of all ranks.

    moments: those of this rank, from `estimate`.
    """
    moments = combine_moments(all_gather(moments))
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
    return combine_moments(all_gather(_whole([masked_moments(x, mask) for x, mask in parts])))


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """Moments of all packs of this rank from those of each; of none, zeros."""
    return combine_moments(torch.stack([torch.zeros(3, dtype=torch.float64), *parts]))
