"""Generalised advantage estimation over packed sequences."""

import torch
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.checks import check_packed

if extension.NOT_BUILT is None:

    @torch.library.register_fake("megatron_orz::packed_gae")
    def _(
        rewards: Tensor, values: Tensor, cu_seqlens: Tensor, loss_mask: Tensor, gamma: float, gae_lambda: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(rewards), torch.empty_like(values), rewards.new_empty(3, dtype=torch.float64)


@torch.no_grad()
def packed_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, loss_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns, restarting at every sequence; the formula is in `reference.packed_gae`.

    rewards, values: [T] float32 or float64; cu_seqlens: [B + 1] int32; loss_mask: [T] bool. Returns advantages and
    returns, [T] without gradient, and the moments of the advantages under the mask, [3] float64 (`moments.py`).
    Raises ValueError when shapes, types, devices or boundaries do not fit together.

        >>> advantages, returns, moments = packed_gae(
        ...     torch.tensor([0.0, 1.0, 0.5]), torch.zeros(3), torch.tensor([0, 2, 3], dtype=torch.int32),
        ...     torch.tensor([False, True, True]), gamma=1.0, gae_lambda=1.0)
        >>> advantages, moments
        (tensor([1.0000, 1.0000, 0.5000]), tensor([2.0000, 0.7500, 0.1250], dtype=torch.float64))
    """
    check_packed(cu_seqlens, loss_mask, rewards=rewards, values=values)
    if extension.has_kernel("packed_gae", rewards.device.type, rewards.dtype):
        return torch.ops.megatron_orz.packed_gae(rewards, values, cu_seqlens, loss_mask, gamma, gae_lambda)
    return reference.packed_gae(rewards, values, cu_seqlens, loss_mask, gamma=gamma, gae_lambda=gae_lambda)
