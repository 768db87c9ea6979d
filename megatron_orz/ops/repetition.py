"""Where sequences repeat what they held before."""

import torch
from torch import Tensor

from megatron_orz.ops import extension, reference


def longest_previous_factor(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each token, how long a stretch from it on also begins at an earlier position of its sequence.

    tokens: [T] int64; cu_seqlens: [B + 1] int32; both on the CPU. Returns [T] int32; the formula is in
    `reference.longest_previous_factor`. Time is linear in T, in the reference quadratic in the longest sequence.
    Raises ValueError when shapes, types, devices or boundaries do not fit together.

        >>> longest_previous_factor(torch.tensor([7, 8, 7, 8, 7, 9]), torch.tensor([0, 6], dtype=torch.int32))
        tensor([0, 0, 3, 2, 1, 0], dtype=torch.int32)
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
        raise ValueError(
            f"tokens must be [T] int64 on the CPU, not {tokens.dtype} {list(tokens.shape)} {tokens.device}"
        )
    bounds = cu_seqlens.tolist()
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [B + 1] int32, not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if not bounds or bounds[0] != 0 or bounds[-1] != len(tokens) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {len(tokens)} tokens, but is {bounds}")
    if extension.has_kernel("longest_previous_factor", "cpu"):
        return torch.ops.megatron_orz.longest_previous_factor(tokens, cu_seqlens)
    return reference.longest_previous_factor(tokens, cu_seqlens)
