"""Log-probabilities and entropies of a pack, straight from hidden states and the output weight.

Logits are computed again in the backward pass: four matrix products in all. A loss that depends on each token alone
needs only three: `token_loss.py`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_orz.ops import reference
from megatron_orz.ops.checks import check_head
from megatron_orz.ops.main_grad import WeightGradient, wide
from megatron_orz.ops.vocabulary import (
    Shard,
    TokenStats,
    dlogits,
    factor,
    logits_stats,
    multiply,
    multiply_add,
    slices,
    token_stats,
)

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Memory for logits and their gradient."""

CPU_TILE = (1024, 2048)
"""Tokens and columns at once on a CPU: the block stays in its cache from one matrix product to the next."""


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """log p(targets) and the entropy of p, where p = softmax(hidden @ weight.T / temperature).

    hidden: [T, H]; weight: [V/tp, H], this rank's rows of the vocabulary; targets: [T] int64, ids in the whole
    vocabulary; loss_mask: [T] bool, the tokens to compute, by default all; vocab_size: rows from there on are padding
    and get no probability. Returns (log_probs, entropy), [T] float32 (float64 for float64 inputs), zero outside the
    mask and equal on every rank of tp_group; with `entropy=False` the second is zero and has no gradient.

    Differentiable in hidden (the gradient is already summed over tp_group) and weight, whose gradient goes straight
    into its `main_grad` if it has one. Raises ValueError when shapes, types or devices do not fit together.
    """
    check_head(hidden, weight, targets, loss_mask)
    shard = Shard.of(weight, vocab_size, tp_group)
    if loss_mask is None:
        return _LinearLogProb.apply(hidden, weight, targets, temperature, shard, entropy)
    index = loss_mask.nonzero().squeeze(1)
    selected = _LinearLogProb.apply(
        hidden.index_select(0, index), weight, targets.index_select(0, index), temperature, shard, entropy
    )
    zeros = selected[0].new_zeros(hidden.shape[0])
    return zeros.index_copy(0, index, selected[0]), zeros.index_copy(0, index, selected[1])


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, shard: Shard, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        stats = head_stats(hidden, weight[: shard.num_rows], targets, shard.start, 1 / temperature, with_entropy)
        of_tokens = token_stats(stats, shard)
        log_prob, entropy, log_sum_exp = of_tokens
        if not with_entropy:
            entropy = torch.zeros_like(entropy)
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(hidden, weight, targets, entropy, log_sum_exp)
        ctx.weight, ctx.temperature, ctx.shard = weight, temperature, shard
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, log_sum_exp = ctx.saved_tensors
        shard: Shard = ctx.shard
        d_weight = WeightGradient.of(ctx.weight)
        d_hidden = head_gradients(
            hidden,
            weight[: shard.num_rows],
            targets,
            log_sum_exp,
            entropy,
            grad_log_prob.contiguous(),
            grad_entropy.contiguous(),
            d_weight.sum[: shard.num_rows],
            shard.start,
            1 / ctx.temperature,
        )
        if shard.group is not None:
            dist.all_reduce(d_hidden, group=shard.group)
        return d_hidden.to(hidden.dtype), d_weight.for_autograd(), None, None, None, None


@torch.library.custom_op("megatron_orz::head_stats", mutates_args=())
def head_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, scale: float, entropy: bool
) -> Tensor:
    """`reference.logits_stats` of hidden [n, H] @ weight [v, H].T: [n, 4]."""
    n, v = hidden.shape[0], weight.shape[0]
    num_tokens, num_columns = _tile(hidden, v, backward=False)
    workspace = hidden.new_empty(num_tokens * num_columns, dtype=wide(hidden.dtype))
    blocks = list(slices(v, num_columns)) or [slice(0, 0)]  # a rank may hold nothing but padding
    stats = hidden.new_empty(len(blocks), n, 4, dtype=wide(hidden.dtype))
    for of_block, block in zip(stats, blocks, strict=True):
        w = factor(weight[block])
        for tokens in slices(n, num_tokens):
            x = factor(hidden[tokens])
            logits = workspace[: len(x) * len(w)].view(len(x), len(w))
            multiply(x, w.t(), out=logits)
            of_block[tokens] = logits_stats(logits, targets[tokens], vocab_start + block.start, scale, entropy)
    return reference.combine_stats(stats)


@head_stats.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, scale: float, entropy: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], 4, dtype=wide(hidden.dtype))


@torch.library.custom_op("megatron_orz::head_gradients", mutates_args=("d_weight",))
def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    d_weight: Tensor,
    vocab_start: int,
    scale: float,
) -> Tensor:
    """Adds the gradient of weight [v, H] to d_weight [v, H]; returns that of hidden, [n, H]. The rest is [n]."""
    n, v = hidden.shape[0], weight.shape[0]
    num_tokens, num_columns = _tile(hidden, v, backward=True)
    workspace = hidden.new_empty(num_tokens * num_columns, dtype=wide(hidden.dtype))
    d_hidden = torch.zeros_like(hidden, dtype=wide(hidden.dtype))
    for block in slices(v, num_columns):
        w = factor(weight[block])
        for tokens in slices(n, num_tokens):
            x = factor(hidden[tokens])
            logits = workspace[: len(x) * len(w)].view(len(x), len(w))
            multiply(x, w.t(), out=logits)
            d = logits if x.dtype == logits.dtype else torch.empty_like(logits, dtype=x.dtype)
            dlogits(
                logits,
                targets[tokens],
                TokenStats(grad_log_prob[tokens], entropy[tokens], log_sum_exp[tokens]),
                grad_log_prob[tokens],
                grad_entropy[tokens],
                vocab_start + block.start,
                scale,
                out=d,
            )
            multiply_add(d, w, out=d_hidden[tokens])
            multiply_add(d.t(), x, out=d_weight[block])
    return d_hidden


@head_gradients.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden, dtype=wide(hidden.dtype))


def _tile(hidden: Tensor, v: int, *, backward: bool) -> tuple[int, int]:
    """Tokens and columns of a block of logits that fits in the workspace.

    On CUDA, one dimension is whole where it can be: all columns forward, all tokens backward, where the gradient of
    the weight is then read and written once.
    """
    n, dtype = hidden.shape[0], wide(hidden.dtype)
    is_cpu = hidden.device.type == "cpu"
    copy_bytes = hidden.dtype.itemsize if backward and not is_cpu and hidden.dtype != dtype else 0
    num_logits = WORKSPACE_BYTES[hidden.device.type] // (dtype.itemsize + copy_bytes)
    if is_cpu:
        num_tokens, num_columns = CPU_TILE
    elif backward:
        num_tokens, num_columns = n, max(num_logits // max(n, 1) // 128, 8) * 128
    else:
        num_tokens, num_columns = num_logits, v
    num_columns = max(1, min(num_columns, v, num_logits))
    return max(1, min(num_tokens, n, num_logits // num_columns)), num_columns
