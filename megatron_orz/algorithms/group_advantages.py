"""Rewards relative to those of the same prompt's other responses: what stands in for a critic.

A response's relative reward is put where its reward would be, at its last token. Without values, and with gamma =
lambda = 1, generalised advantage estimation then gives it to every token of the response.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_orz.types import Rollout

Relative: TypeAlias = Callable[[Tensor], Tensor]
"""Rewards of the n responses to one prompt, [n] float64, to their advantages, [n]."""

MIN_STD = 1e-6
"""Below it the rewards of a group are equal, and what is left of their differences is rounding."""


def group_centred(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r), as in Dr. GRPO (Liu et al., Understanding R1-Zero-Like Training, 2025).

    Whitened over the whole step afterwards, it is REINFORCE++ with baseline (Hu et al., 2025).
    """
    return rewards - rewards.mean()


def group_normalised(rewards: Tensor) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r), as in GRPO (Shao et al., DeepSeekMath, 2024).

    The standard deviation is that of these n rewards, not an estimate from them; equal rewards have advantage 0.
    """
    return group_centred(rewards) / rewards.std(correction=0).clamp(min=MIN_STD)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other r_j, as in RLOO (Ahmadian et al., Back to Basics, 2024).

    A response without others has nothing to be compared with: its advantage is 0.
    """
    num_others = len(rewards) - 1
    return group_centred(rewards) * (len(rewards) / max(num_others, 1))


def relative_rewards(rollouts: Sequence[Rollout], rewards: Sequence[float], relative: Relative) -> list[float]:
    """The advantage of each rollout among those of its prompt, which may lie anywhere in `rollouts`."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, rollout in enumerate(rollouts):
        groups[rollout.prompt.prompt_id].append(index)
    every_reward = torch.tensor(rewards, dtype=torch.float64)
    advantages = torch.empty_like(every_reward)
    for indices in groups.values():
        advantages[indices] = relative(every_reward[indices])
    return advantages.tolist()
