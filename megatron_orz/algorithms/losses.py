"""The losses, a value for every token, and the weights that average them.

A loss here is not reduced. `token_weights` turns the mean a run asks for into a weight for each token, such that the
sum of weight * loss over every pack of every rank is that mean; the engine does the sum.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_orz.ops.reference import clipped_squared_error
from megatron_orz.types import Experience, LossMean, LossOutput, PackedBatch, PolicyLoss, PolicyOutput


def policy_loss(
    output: PolicyOutput,
    experience: Experience,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> LossOutput:
    """PPO's clipped surrogate: -w min(rho A, clip(rho, 1 - eps, 1 + eps_high) A), rho = pi / pi_old.

    eps_high is eps in PPO; in DAPO it is larger, which lets unlikely tokens gain more (Yu et al., 2025, section 3.1).
    w are the importance weights of the experience, where it has any (`importance.py`). The KL divergence from pi_old is
    estimated as rho - 1 - log rho, which is never negative.
    """
    eps_high = clip_eps if clip_eps_high is None else clip_eps_high
    # Prompt tokens do not count, and must not overflow the exponential.
    log_ratio = torch.where(experience.loss_mask, output.log_probs - experience.old_log_probs, 0.0)
    ratio = log_ratio.exp()
    unclipped = -ratio * experience.advantages
    clipped = -ratio.clamp(1 - clip_eps, 1 + eps_high) * experience.advantages
    per_token = torch.maximum(unclipped, clipped)
    metrics = {
        "policy/clip_share": (clipped > unclipped).float(),
        "policy/approx_kl": (ratio - 1 - log_ratio).detach(),
        "policy/entropy": output.entropy.detach(),
        "policy/ratio": ratio.detach(),
    }
    if experience.importance_weights is not None:
        per_token = experience.importance_weights * per_token
    return LossOutput(per_token=per_token, metrics=metrics)


def entropy_loss(output: PolicyOutput, experience: Experience) -> LossOutput:
    """-H(pi( . | state)), to be added with the coefficient of an entropy bonus. Its metric is `policy_loss`'s."""
    return LossOutput(per_token=-output.entropy, metrics={})


@dataclass(frozen=True)
class WeightedLosses:
    """sum_i coefficient_i * loss_i, token by token, with the metrics of all of them."""

    terms: Sequence[tuple[float, PolicyLoss]]
    """Coefficients and losses. One of coefficient 0 is there for its metrics."""

    def __call__(self, output: PolicyOutput, experience: Experience) -> LossOutput:
        """output: [T] each."""
        per_token = torch.zeros_like(output.log_probs)
        metrics: dict[str, Tensor] = {}
        for coefficient, loss in self.terms:
            term = loss(output, experience)
            metrics |= term.metrics
            if coefficient != 0:
                per_token = per_token + coefficient * term.per_token
        return LossOutput(per_token=per_token, metrics=metrics)


@dataclass(frozen=True)
class ClippedValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2). An object, so that an engine can know it."""

    clip_eps: float
    """0 turns clipping off."""

    def __call__(self, values: Tensor, experience: Experience) -> LossOutput:
        """values: [T] float32."""
        per_token, is_clipped = clipped_squared_error(
            values, experience.old_values, experience.returns, clip_eps=self.clip_eps
        )
        return LossOutput(
            per_token=per_token, metrics={"critic/clip_share": is_clipped.float(), "critic/value": values.detach()}
        )


def next_token_loss(output: PolicyOutput, batch: PackedBatch) -> LossOutput:
    """Cross-entropy of the targets, for supervised training: -log pi(target)."""
    return LossOutput(per_token=-output.log_probs, metrics={"policy/entropy": output.entropy.detach()})


def loss_totals(batches: Iterable[PackedBatch]) -> Tensor:
    """Counts of loss tokens, of packs and of sequences that hold any: [3] float64, to be summed over ranks."""
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        per_sequence = _loss_tokens_per_sequence(batch)
        counts = torch.stack([per_sequence.sum(), (per_sequence > 0).any(), (per_sequence > 0).sum()])
        totals = totals.to(counts.device) + counts
    return totals


def token_weights(batch: PackedBatch, mean: LossMean, totals: Tensor, *, max_response_tokens: int = 0) -> Tensor:
    """The weight of each token in the mean over a mini-batch: [T] float32, 0 outside the mask.

    totals: `loss_totals` of the whole mini-batch, summed over ranks. max_response_tokens: what `constant` takes for the
    length of every response. The weights of a mini-batch sum to 1, those of `constant` to less.

    With a pack of two responses of 1 and 3 tokens and another pack of one response of 2 tokens, of at most 4 tokens:

        token       1/6              1/6, 1/6, 1/6              1/6, 1/6
        pack        1/4 * 1/2        1/4 * 1/2 three times      1/2 * 1/2 twice
        sequence    1/1 * 1/3        1/3 * 1/3 three times      1/2 * 1/3 twice
        constant    1/4 * 1/3        1/4 * 1/3 three times      1/4 * 1/3 twice
    """
    num_tokens, num_packs, num_sequences = totals.clamp(min=1).to(batch.loss_mask.device)
    if mean == "token":
        denominator = num_tokens
    elif mean == "pack":
        denominator = batch.loss_mask.sum() * num_packs
    elif mean == "constant":
        assert max_response_tokens > 0, "the mean over a constant length needs that length"
        denominator = max_response_tokens * num_sequences
    else:
        per_sequence = _loss_tokens_per_sequence(batch) * num_sequences
        denominator = per_sequence.repeat_interleave(batch.cu_seqlens.diff())
    return torch.where(batch.loss_mask, 1 / denominator, 0.0).float()


def _loss_tokens_per_sequence(batch: PackedBatch) -> Tensor:
    """[B] int64."""
    return F.pad(batch.loss_mask.cumsum(0), (1, 0))[batch.cu_seqlens].diff()
