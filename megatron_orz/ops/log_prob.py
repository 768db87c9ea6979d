"""Log-probabilities and entropies of a pack, straight from hidden states and the output weight.

Logits exist a chunk of tokens at a time, in float32, and are computed again in the backward pass: [T, V] is never held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Memory for one chunk of float32 logits."""


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_mask: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(targets) and the entropy of p, where p = softmax(hidden @ weight.T / temperature).

    hidden: [T, H]; weight: [V/tp, H], this rank's rows of the vocabulary; targets: [T] int64, ids in the whole
    vocabulary; loss_mask: [T] bool, the tokens to compute; vocab_size: rows from there on are padding and get no
    probability. Returns (log_probs, entropy), [T] float32, zero outside the mask and equal on every rank of tp_group.
    Differentiable in hidden (the gradient is already summed over tp_group) and weight.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} are not [T, H] and [V, H]")
    if targets.shape != hidden.shape[:1] or loss_mask.shape != targets.shape or loss_mask.dtype != torch.bool:
        raise ValueError(
            f"targets {list(targets.shape)} and loss_mask {list(loss_mask.shape)} {loss_mask.dtype} must be "
            f"[{hidden.shape[0]}], loss_mask of type bool"
        )
    tp_rank = dist.get_rank(tp_group) if tp_group is not None and tp_group.size() > 1 else 0
    vocab_start = tp_rank * weight.shape[0]
    num_rows = weight.shape[0] if vocab_size is None else min(max(vocab_size - vocab_start, 0), weight.shape[0])
    index = loss_mask.nonzero().squeeze(1)
    selected = _LinearLogProb.apply(
        hidden.index_select(0, index), weight[:num_rows], targets[index] - vocab_start, temperature, tp_group
    )
    zeros = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    return zeros.index_copy(0, index, selected[0]), zeros.index_copy(0, index, selected[1])


class _LinearLogProb(torch.autograd.Function):
    """With z = logits / temperature, lse = log sum_v exp z_v and p = exp(z - lse):

    log_prob = z_target - lse, entropy = lse - sum_v p_v z_v,
    d log_prob / dz_v = [v is target] - p_v, d entropy / dz_v = -p_v (log p_v + entropy).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """hidden: [n, H]; weight: [v, H]; targets: [n] relative to this rank's first row, outside [0, v) elsewhere."""
        n, v = hidden.shape[0], weight.shape[0]
        stats = torch.empty(n, 4, dtype=torch.float32, device=hidden.device)  # max, sum exp, sum z exp, z_target
        rows = _rows_per_chunk(hidden, v)
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            stats[chunk] = _row_stats(_logits(hidden[chunk], weight, temperature), targets[chunk])
        if tp_group is not None and tp_group.size() > 1 and n > 0:
            shards = [torch.empty_like(stats) for _ in range(tp_group.size())]
            dist.all_gather(shards, stats, group=tp_group)
            stats = _combine(torch.stack(shards))
        maximum, sum_exp, sum_z_exp, z_target = stats.unbind(1)
        lse = maximum + sum_exp.log()
        entropy = lse - sum_z_exp / sum_exp
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.tp_group = temperature, tp_group
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        grad_log_prob, grad_entropy = grads
        d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        rows = _rows_per_chunk(hidden, weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            log_p = _logits(hidden[chunk], weight, ctx.temperature).sub_(lse[chunk, None])
            p = log_p.exp()
            # d = -p * (g_log_prob + g_entropy * (log p + entropy)) + g_log_prob * onehot(target)
            d_logits = log_p.add_(entropy[chunk, None]).mul_(grad_entropy[chunk, None]).add_(grad_log_prob[chunk, None])
            d_logits.mul_(p).neg_()
            is_local = (targets[chunk] >= 0) & (targets[chunk] < weight.shape[0])
            local = is_local.nonzero().squeeze(1)
            d_logits[local, targets[chunk][local]] += grad_log_prob[chunk][local]
            d_logits.div_(ctx.temperature)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[chunk] = _matmul_float32(d_logits, weight)
            d_weight += _matmul_float32(d_logits.t(), hidden[chunk])
        if ctx.tp_group is not None and ctx.tp_group.size() > 1 and hidden.shape[0] > 0:
            dist.all_reduce(d_hidden, group=ctx.tp_group)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None


def _rows_per_chunk(hidden: Tensor, vocab: int) -> int:
    return max(1, WORKSPACE_BYTES[hidden.device.type] // (4 * max(1, vocab)))


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 results, whatever the inputs; exact products of bfloat16 are never rounded."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return _matmul_float32(hidden, weight.t()).div_(temperature)


def _row_stats(z: Tensor, targets: Tensor) -> Tensor:
    """[n, v] logits -> [n, 4]: max, sum exp(z - max), sum z exp(z - max), z_target (0 when it lies elsewhere)."""
    if z.shape[1] == 0:
        return z.new_tensor([float("-inf"), 0.0, 0.0, 0.0]).expand(z.shape[0], 4)
    maximum = z.max(dim=1).values
    exp = (z - maximum[:, None]).exp_()
    is_local = (targets >= 0) & (targets < z.shape[1])
    z_target = z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    return torch.stack([maximum, exp.sum(1), (exp.mul_(z)).sum(1), z_target.where(is_local, 0.0)], dim=1)


def _combine(shards: Tensor) -> Tensor:
    """Row statistics of vocabulary shards [tp, n, 4] -> [n, 4], summed in rank order on every rank."""
    maximum = shards[..., 0].max(dim=0).values
    scale = (shards[..., 0] - maximum).exp()
    return torch.stack(
        [maximum, (shards[..., 1] * scale).sum(0), (shards[..., 2] * scale).sum(0), shards[..., 3].sum(0)], dim=1
    )
