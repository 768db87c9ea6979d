"""Where sequences repeat what they held before."""

import torch
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.checks import check_tokens


def longest_previous_factor(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each token, how long a stretch from it on also begins at an earlier position of its sequence.

    tokens: [T] int64; cu_seqlens: [B + 1] int32; both on the CPU. Returns [T] int32; the formula is in
    `reference.longest_previous_factor`. Time is linear in T, in the reference quadratic in the longest sequence.
    Raises ValueError when shapes, types, devices or boundaries do not fit together.

        >>> longest_previous_factor(torch.tensor([7, 8, 7, 8, 7, 9]), torch.tensor([0, 6], dtype=torch.int32))
        tensor([0, 0, 3, 2, 1, 0], dtype=torch.int32)
    """
    check_tokens(tokens, cu_seqlens)
    if extension.has_kernel("longest_previous_factor", "cpu"):
        return torch.ops.megatron_orz.longest_previous_factor(tokens, cu_seqlens)
    return reference.longest_previous_factor(tokens, cu_seqlens)
