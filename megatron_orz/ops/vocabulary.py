"""The output layer of a language model, a block of tokens and vocabulary at a time: [T, V] never exists.

The matrix products are PyTorch's, with float32 results (float64 for float64 inputs); the passes over rows of logits in
between are kernels. With x = hidden @ weight.T / temperature, lse = log sum_v e^x_v and p = e^(x - lse):

    log_prob = x_target - lse,    entropy H = -sum_v p_v log p_v,

and under a loss with gradient g in log_prob and h in H

    d loss / d x_v = g [v is target] - p_v (g + h (log p_v + H)).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.main_grad import wide

if extension.NOT_BUILT is None:

    @torch.library.register_fake("megatron_orz::logits_stats")
    def _(logits: Tensor, targets: Tensor, vocab_start: int, scale: float, entropy: bool) -> Tensor:
        return logits.new_empty(logits.shape[0], 4)

    @torch.library.register_fake("megatron_orz::dlogits")
    def _(*_: Tensor | int | float, out: Tensor) -> None:
        return None


class Shard(NamedTuple):
    """The rows of the vocabulary that this rank holds."""

    start: int  # id of the first one
    num_rows: int  # the rest of its weight pads the vocabulary
    group: dist.ProcessGroup | None  # ranks with the other rows

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> "Shard":
        """weight: [V/tp, H], the rank's part of [V, H] in rank order; rows from vocab_size on are padding."""
        if group is not None and group.size() == 1:
            group = None
        start = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        num_rows = weight.shape[0] if vocab_size is None else min(max(vocab_size - start, 0), weight.shape[0])
        return cls(start, num_rows, group)


class TokenStats(NamedTuple):
    """Of each token's distribution, [n]."""

    log_prob: Tensor
    entropy: Tensor
    log_sum_exp: Tensor


def token_stats(stats: Tensor, shard: Shard) -> TokenStats:
    """stats: [n, 4], `reference.logits_stats` of this rank's columns; exchanged with the other ranks here."""
    if shard.group is not None:
        shards = [torch.empty_like(stats) for _ in range(shard.group.size())]
        dist.all_gather(shards, stats, group=shard.group)
        stats = reference.combine_stats(torch.stack(shards))
    maximum, sum_exp, moment, target_logit = stats.unbind(1)
    log_sum_exp = maximum + sum_exp.log()
    return TokenStats(target_logit - log_sum_exp, sum_exp.log() - moment / sum_exp, log_sum_exp)


def factor_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type in which numbers enter matrix products: GPUs multiply half precision fast, CPUs slowly."""
    return wide(dtype) if device_type == "cpu" else dtype


def factor(x: Tensor) -> Tensor:
    """x as matrix products take it."""
    return x.to(factor_dtype(x.dtype, x.device.type))


def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a @ b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_add(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out += a @ b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def logits_stats(logits: Tensor, targets: Tensor, vocab_start: int, scale: float, entropy: bool) -> Tensor:
    """[n, v] -> [n, 4]; see `reference.logits_stats`."""
    kernel = extension.has_kernel("logits_stats", logits.device.type, logits.dtype)
    op = torch.ops.megatron_orz.logits_stats if kernel else reference.logits_stats
    return op(logits, targets, vocab_start, scale, entropy)


def dlogits(
    logits: Tensor,
    targets: Tensor,
    of_tokens: TokenStats,
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    vocab_start: int,
    scale: float,
    out: Tensor,
) -> None:
    """Writes d loss / d logits, [n, v], to out, which may be the logits; see `reference.dlogits`."""
    kernel = extension.has_kernel("dlogits", logits.device.type, logits.dtype)
    op = torch.ops.megatron_orz.dlogits if kernel else reference.dlogits
    _, entropy, log_sum_exp = of_tokens
    op(logits, targets, log_sum_exp, entropy, grad_log_prob, grad_entropy, vocab_start, scale, out=out)


def slices(stop: int, step: int) -> Iterator[slice]:
    """[0, stop) in steps."""
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))
