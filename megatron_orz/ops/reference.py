"""Every op of this package in plain PyTorch: the specification the kernels are tested against.

Runs on any device and in any floating type; slower than the kernels, and checks nothing.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_orz.ops.moments import masked_moments


def packed_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, loss_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Generalised advantage estimation over packed sequences; the state after a sequence's last token has value 0.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = sum_{l >= 0} (gamma lambda)^l delta_{t+l}        within the sequence
        R_t     = A_t + V_t

    rewards, values, loss_mask: [T]; cu_seqlens: [B + 1]. Returns advantages and returns, [T] each, and the moments of
    the advantages under the mask, [3].

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
    return advantages, advantages + values, masked_moments(advantages, loss_mask)


def clipped_squared_error(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss: 0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), and where clipping decides.

    All are [T], the second result bool. clip_eps 0 turns clipping off. Differentiable in values.
    """
    unclipped = (values - returns).square()
    if clip_eps == 0:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    clipped = (values.clamp(old_values - clip_eps, old_values + clip_eps) - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def packed_value_loss(
    hidden: Tensor,
    head: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    clip_eps: float,
    *,
    d_head: Tensor,
) -> tuple[Tensor, Tensor]:
    """Values V = hidden . head, and the gradient of sum_t weights_t * `clipped_squared_error`_t:

        d_value = weight (V - R),  0 where clipping decides or the weight is 0
        d_hidden = d_value head,  d_head += sum_t d_value_t hidden_t

    hidden: [T, H]; head, d_head: [H]; the rest [T]. Returns values [T] and d_hidden [T, H].
    """
    rows, is_counted = hidden.to(returns.dtype), weights != 0
    values = rows @ head.to(returns.dtype)
    _, is_clipped = clipped_squared_error(values, old_values, returns, clip_eps=clip_eps)
    d_values = torch.where(is_counted & ~is_clipped, weights * (values - returns), 0.0)
    d_head += d_values @ torch.where(is_counted[:, None], rows, 0.0)
    return values, torch.where(is_counted[:, None], d_values[:, None] * head, 0.0).to(hidden.dtype)


def linear_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(targets) and the entropy -sum_v p_v log p_v, where p = softmax(hidden @ weight.T / temperature).

    hidden: [n, H]; weight: [V, H]; targets: [n]. Returns log_probs and entropy, [n] each.
    """
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def logits_stats(logits: Tensor, targets: Tensor, vocab_start: int, scale: float, entropy: bool) -> Tensor:
    """What softmax needs of a block of logits, the columns of the vocabulary from vocab_start on. With x = scale z,

        m = max_v x_v,  s = sum_v e^(x_v - m),  y = sum_v (x_v - m) e^(x_v - m),  t = x_target, 0 if it lies elsewhere

    logits: [n, v]; targets: [n], ids in the whole vocabulary. Returns [n, 4] = (m, s, y, t); y is 0 without `entropy`.
    """
    x = F.pad(logits * scale, (0, 1), value=float("-inf"))  # one column more, so that a block may have none
    maximum = x.max(dim=1).values
    below = (x - maximum.where(maximum != float("-inf"), 0.0)[:, None]).clamp(min=-700)  # 0 * -inf would be nan
    exp = below.exp()
    moment = (below * exp).sum(1) if entropy else torch.zeros_like(maximum)
    column = targets - vocab_start
    is_here = (column >= 0) & (column < logits.shape[1])
    target_logit = x.gather(1, torch.where(is_here, column, 0)[:, None]).squeeze(1)
    return torch.stack([maximum, exp.sum(1), moment, target_logit.where(is_here, 0.0)], dim=1)


def combine_stats(blocks: Tensor) -> Tensor:
    """Statistics of a vocabulary's blocks, [blocks, n, 4], to those of the whole, [n, 4]; added in order.

    With M the largest m:  s = sum_b e^(m_b - M) s_b,  y = sum_b e^(m_b - M) (y_b + (m_b - M) s_b).
    """
    m, s, y, t = blocks.unbind(2)
    maximum = m.max(dim=0).values
    # A block without columns has m = -inf and s = 0, and so may the whole.
    below = (m - maximum.where(maximum != float("-inf"), 0.0)).clamp(min=-700)
    scale = below.exp()
    return torch.stack([maximum, (scale * s).sum(0), (scale * (y + below * s)).sum(0), t.sum(0)], dim=1)


def dlogits(
    logits: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    vocab_start: int,
    scale: float,
    *,
    out: Tensor,
) -> None:
    """Of a loss with gradient g in each log-probability and h in each entropy H, the gradient in a block of logits:

        out_v = scale (g [v is target] - p_v (g + h (log p_v + H)))        log p_v = scale z_v - lse

    logits, out: [n, v], maybe one tensor; the rest [n].
    """
    g, h = grad_log_prob[:, None], grad_entropy[:, None]
    log_p = (scale * logits - log_sum_exp[:, None]).clamp(min=-700)
    is_target = targets[:, None] - vocab_start == torch.arange(logits.shape[1], device=logits.device)
    out.copy_(scale * (g * is_target - log_p.exp() * (g + h * (log_p + entropy[:, None]))))


def longest_previous_factor(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each token, the longest stretch from it on that also begins earlier in its sequence, overlap allowed:

        lpf_t    = max_{u < t} c(t, u)
        c(t, u)  = 1 + c(t + 1, u + 1) if s_t = s_u, else 0        0 behind the end

    tokens: [T] int64; cu_seqlens: [B + 1]. Returns [T] int32.
    """
    lengths = torch.zeros(len(tokens), dtype=torch.int32)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        common = torch.zeros(end - start + 1, dtype=torch.int32)  # c(t + 1, u) for u <= t + 1
        for t in range(end - 1, start, -1):
            common = torch.where(tokens[start:t] == tokens[t], common[1 : t - start + 1] + 1, 0)
            lengths[t] = common.max()
    return lengths


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    """softmax(scale q_bh . K) V, K and V the first lengths_b tokens of slot slots_b, or the last `window` > 0 of them.

    query: [B, heads, d]; keys, values: [S, kv_heads, C, d], finite everywhere; slots, lengths: [B]. [B, heads, d].
    """
    num_kv_heads = keys.shape[1]
    longest = int(lengths.max()) if len(lengths) else 0
    position = torch.arange(longest, device=lengths.device)
    is_visible = position < lengths[:, None]
    if window:
        is_visible &= position >= lengths[:, None] - window
    # Query heads that share a key-value head see the same keys: they can be the positions of one query.
    out = F.scaled_dot_product_attention(
        query.unflatten(1, (num_kv_heads, -1)),
        keys[slots, :, :longest],
        values[slots, :, :longest],
        attn_mask=is_visible[:, None, None],
        scale=scale,
    )
    return out.flatten(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x_i (mean_j x_j^2 + eps)^(-1/2) w_i over the last dimension. x: [..., H]; weight: [H]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) b for rows [a, b], where silu(a) = a / (1 + e^-a). x: [..., 2 F]. Returns [..., F]."""
    gate, linear = x.chunk(2, dim=-1)
    return F.silu(gate) * linear


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) as complex numbers x_i + j x_{i + d/2}, times cos + j sin.

    x: [T, heads, d]; cos, sin: [T, d/2].
    """
    (left, right), cos, sin = x.chunk(2, dim=-1), cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
