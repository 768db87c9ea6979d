"""A loss of each token's log-probability and entropy, with its gradients, in one pass over the tokens.

The logits of a chunk of tokens stay until the loss has said what it makes of them, so that no matrix product runs
twice: three in all, where `log_prob.py` needs four.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_orz.ops.checks import check_head
from megatron_orz.ops.log_prob import linear_log_prob
from megatron_orz.ops.main_grad import LossGradients, WeightGradient, wide
from megatron_orz.ops.vocabulary import (
    Shard,
    dlogits,
    factor,
    factor_dtype,
    logits_stats,
    multiply,
    multiply_add,
    slices,
    token_stats,
)

TokenLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(index [n] int64, log_probs [n], entropy [n]) -> [n], what these tokens add to the loss. Differentiable."""

WORKSPACE_BYTES = {"cpu": 96 << 20, "cuda": 4 << 30}
"""Memory for logits and their gradient."""

CHUNK_TOKENS = 8192
"""Most tokens at once: the larger, the less often the gradient of the weight is read and written."""

PARTS_OF_CHUNK = 4
"""On CUDA with half precision, the parts of a chunk whose float32 logits exist at once."""

UPCAST_ROWS = 2048
"""Rows of a half-precision weight that are float32 at once, on a CPU."""


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `loss` over the tokens of the mask, each seen once, in chunks; arguments as for `linear_log_prob`.

    Returns the loss, a scalar that is differentiable in hidden and weight, and log_probs and entropy, [T] without
    gradient, zero outside the mask. Where the weight has a `main_grad`, the loss must be backpropagated as it is, once:
    see `main_grad.py`. Equals, but for rounding and the work it takes,

        log_probs, entropy = linear_log_prob(hidden, weight, targets, ...)
        index = loss_mask.nonzero().squeeze(1)
        loss(index, log_probs[index], entropy[index]).sum()
    """
    check_head(hidden, weight, targets, loss_mask)
    num_tokens = hidden.shape[0]
    if loss_mask is None:
        index = torch.arange(num_tokens, device=hidden.device)
    else:
        index = loss_mask.nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        shard = Shard.of(weight, vocab_size, tp_group)
        total, log_probs, entropy = _LinearTokenLoss.apply(hidden, weight, targets, index, loss, temperature, shard)
    else:
        log_probs, entropy = linear_log_prob(
            hidden, weight, targets, temperature=temperature, vocab_size=vocab_size, tp_group=tp_group
        )
        total = loss(index, log_probs, entropy).sum()
    zeros = log_probs.new_zeros(num_tokens)
    return total, zeros.index_copy(0, index, log_probs), zeros.index_copy(0, index, entropy)


def workspace_bytes(num_tokens: int, num_rows: int, dtype: torch.dtype, device_type: str) -> int:
    """Memory of the logits and gradients that exist at once. num_rows: V/tp; dtype: that of the weight."""
    chunk, part = _chunk_tokens(num_rows, dtype, device_type)
    logits = min(part, num_tokens) * wide(dtype).itemsize
    gradients = 0 if _is_in_place(dtype, device_type) else min(chunk, num_tokens) * dtype.itemsize
    return num_rows * (logits + gradients)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        index: Tensor,
        loss: TokenLoss,
        temperature: float,
        shard: Shard,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_gradient = WeightGradient.of(weight)
        n, v, dtype = hidden.shape[0], shard.num_rows, wide(hidden.dtype)
        chunk, part = _chunk_tokens(len(weight), hidden.dtype, hidden.device.type)
        weight, d_weight = weight[:v], weight_gradient.sum[:v]
        num_rows = max(v, 1) if factor_dtype(weight.dtype, weight.device.type) == weight.dtype else UPCAST_ROWS
        all_logits = hidden.new_empty(min(part, n), v, dtype=dtype)
        all_d = all_logits if _is_in_place(hidden.dtype, hidden.device.type) else hidden.new_empty(min(chunk, n), v)

        total = hidden.new_zeros((), dtype=dtype)
        log_probs, entropy = hidden.new_empty(2, n, dtype=dtype)
        d_hidden = torch.zeros_like(hidden, dtype=dtype)
        for tokens in slices(n, chunk):
            x = factor(hidden[tokens])
            d = all_d[: len(x)]
            for rows in slices(len(x), part):
                these = slice(tokens.start + rows.start, tokens.start + rows.stop)
                logits = all_logits[: rows.stop - rows.start]
                for block in slices(v, num_rows):
                    multiply(x[rows], factor(weight[block]).t(), out=logits[:, block])
                stats = token_stats(logits_stats(logits, targets[these], shard.start, 1 / temperature, True), shard)
                log_probs[these], entropy[these] = stats.log_prob, stats.entropy
                sum_of_losses, g, h = _gradients(loss, index[these], stats.log_prob, stats.entropy)
                total += sum_of_losses
                dlogits(logits, targets[these], stats, g, h, shard.start, 1 / temperature, out=d[rows])
            for block in slices(v, num_rows):
                multiply_add(d[:, block], factor(weight[block]), out=d_hidden[tokens])
            reduction = None
            if shard.group is not None:
                reduction = dist.all_reduce(d_hidden[tokens], group=shard.group, async_op=True)
            for block in slices(v, num_rows):
                multiply_add(d[:, block].t(), x, out=d_weight[block])
            if reduction is not None:
                reduction.wait()
        ctx.gradients = LossGradients(d_hidden.to(hidden.dtype), weight_gradient)
        ctx.mark_non_differentiable(log_probs, entropy)
        return total, log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.for_autograd(grad_loss), None, None, None, None, None


def _gradients(loss: TokenLoss, index: Tensor, log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of a loss over some tokens, and its gradients in their log-probabilities and entropies, [n] each."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (log_probs, entropy)]
        total = loss(index, *inputs).sum()
        g, h = torch.autograd.grad(total, inputs, materialize_grads=True)
    return total.detach(), g.contiguous(), h.contiguous()


def _is_in_place(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the gradients d are written over the logits: they have one type."""
    return factor_dtype(dtype, device_type) == wide(dtype)


def _chunk_tokens(num_rows: int, dtype: torch.dtype, device_type: str) -> tuple[int, int]:
    """Tokens of a chunk, and of the part of it whose logits exist at once: one and the same where d is in place.

    num_rows: V/tp. Depends on nothing that tensor-parallel ranks do not share, such as how many of their rows are
    padding: they exchange the statistics of each part.
    """
    budget = WORKSPACE_BYTES[device_type] // max(num_rows, 1)
    if _is_in_place(dtype, device_type):
        chunk = part = min(CHUNK_TOKENS, budget // wide(dtype).itemsize)
    else:
        bytes_of_part = wide(dtype).itemsize + PARTS_OF_CHUNK * dtype.itemsize
        part = min(CHUNK_TOKENS // PARTS_OF_CHUNK, budget // bytes_of_part)
        chunk = PARTS_OF_CHUNK * part
    return max(1, chunk), max(1, part)
