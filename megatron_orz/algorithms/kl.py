"""How far the policy is from a reference, token by token: as a term of the loss, or taken from the rewards."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_orz.types import Experience, KLEstimator, LossOutput, PackedBatch, PolicyOutput

# With x ~ pi and d = log pi(x) - log ref(x) (Schulman, Approximating KL Divergence, 2020).
ESTIMATORS: Mapping[KLEstimator, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * d.square(),
    "k3": lambda d: torch.expm1(-d) + d,
}
"""The estimates of KL(pi || ref), of equal shape with d:

    k1    d                     unbiased; of either sign
    k2    d^2 / 2               biased; its gradient is an unbiased one of the divergence
    k3    exp(-d) - 1 + d       unbiased; never negative
"""


def kl_loss(output: PolicyOutput, experience: Experience, *, estimator: KLEstimator) -> LossOutput:
    """An estimate of KL(pi || ref) for each token, differentiated as it is written.

    That gives the divergence's gradient for k2 alone: k3's points from the reference's samples (the forward
    divergence), and k1's is 0 on average.
    """
    per_token = _estimate(output.log_probs, experience, experience.ref_log_probs, estimator)
    return LossOutput(per_token=per_token, metrics={"policy/reference_kl": per_token.detach()})


def with_kl_penalty(
    batch: PackedBatch, old_log_probs: Tensor, ref_log_probs: Tensor, *, estimator: KLEstimator, coefficient: float
) -> PackedBatch:
    """r_t - coefficient * KL_t on response tokens (as in Ouyang et al., Training Language Models, 2022).

    old_log_probs, ref_log_probs: [T] float32.
    """
    penalty = coefficient * _estimate(old_log_probs, batch, ref_log_probs, estimator)
    return replace(batch, rewards=batch.rewards - penalty)


def _estimate(log_probs: Tensor, batch: PackedBatch, ref_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    # Prompt tokens do not count, and must not overflow the exponential.
    return ESTIMATORS[estimator](torch.where(batch.loss_mask, log_probs - ref_log_probs, 0.0))
