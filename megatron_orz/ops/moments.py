"""Moments of numbers under a mask: [3] float64 tensors of (count, mean, M2), M2 the sum of squared deviations.

Moments of parts combine exactly into those of the whole: E[x^2] - E[x]^2 would lose the digits of a distant mean.
"""

import torch
from torch import Tensor


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
