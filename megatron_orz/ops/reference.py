"""Every op of this package in plain PyTorch: the specification the kernels are tested against.

Runs on any device and in any floating type; slower than the kernels, and checks nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over packed sequences; the state after a sequence's last token has value 0.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = sum_{l >= 0} (gamma lambda)^l delta_{t+l}        within the sequence
        R_t     = A_t + V_t

    rewards, values: [T]; cu_seqlens: [B + 1]. Returns advantages and returns, [T] each.

    The sum is built by doubling: with S_n(t) the sum of its first n terms,
    S_2n(t) = S_n(t) + (gamma lambda)^n S_n(t + n), so ceil(log2(longest sequence)) sweeps over T suffice.
    """
    lengths = cu_seqlens.diff()
    ends = cu_seqlens[1:].repeat_interleave(lengths)
    num_left = ends - torch.arange(len(values), device=values.device)  # [T], this token included

    def ahead(x: Tensor, n: int) -> Tensor:
        """x[t + n], or 0 where that is past the end of t's sequence."""
        return torch.where(num_left > n, F.pad(x[n:], (0, n)), 0.0)

    advantages = rewards + gamma * ahead(values, 1) - values
    longest = int(lengths.max()) if len(lengths) > 0 else 0
    num_terms = 1
    while num_terms < longest:
        advantages = advantages + (gamma * gae_lambda) ** num_terms * ahead(advantages, num_terms)
        num_terms *= 2
    return advantages, advantages + values
