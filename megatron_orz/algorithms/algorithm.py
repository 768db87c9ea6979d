"""What distinguishes one algorithm from another, as the loop sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_orz.algorithms.advantages import AllGather
from megatron_orz.types import Experience, LossOutput, Metrics, PackedBatch, PolicyLoss, Rollout, ValueLoss

Estimate: TypeAlias = Callable[
    [Sequence[PackedBatch], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[list[Experience], Tensor]
]
"""(packs, old_log_probs, old_values, ref_log_probs) -> experience, moments of its advantages: `advantages.estimate`."""

Whiten: TypeAlias = Callable[[list[Experience], Tensor, AllGather], list[Experience]]
"""(experience, moments, all_gather) -> experience as the losses see it: `advantages.whiten_advantages`, or as it is."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Functions that a run composes once, from its config."""

    rewards: Callable[[Sequence[Rollout]], list[float]]
    """What each graded rollout is credited with, at its last token."""
    estimate: Estimate
    whiten: Whiten
    policy_loss: PolicyLoss
    value_loss: ValueLoss
    needs_old_log_probs: bool = True
    """False: nothing but an only update of the policy asks for log pi_old, and that update's own forward pass is it."""

    def is_on_policy(self, num_policy_updates: int) -> bool:
        """Whether a step with so many updates of the policy finds log pi_old in the first of them."""
        return num_policy_updates == 1 and not self.needs_old_log_probs


class Absent:
    """Stands where an algorithm has no critic, or no reference: says 0 of every token, and never learns."""

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Zeros, [T] float32 for each batch."""
        return [torch.zeros(batch.tokens.shape[0]) for batch in batches]

    def step(self, minibatch: Sequence[Experience], loss: Callable[..., LossOutput]) -> Metrics:
        """Is never called: an algorithm without a critic has no mini-batches for one."""
        raise AssertionError("there is no model to train")

    def refresh(self, step: int) -> None:
        """Has nothing to refresh."""
