"""The reward of a whole response, before it is credited to tokens."""

from collections.abc import Sequence

from megatron_orz.types import Rollout


def graded_rewards(rollouts: Sequence[Rollout], *, overlong_tokens: int, max_response_tokens: int) -> list[float]:
    """The verifier's reward of each rollout, plus the soft over-long penalty. Raises ValueError for one not graded."""
    rewards = []
    for rollout in rollouts:
        if rollout.grade is None:
            raise ValueError(f"a rollout of prompt {rollout.prompt.prompt_id} is not graded; grade it first")
        length = len(rollout.response_ids)
        penalty = overlong_penalty(length, overlong_tokens=overlong_tokens, max_response_tokens=max_response_tokens)
        rewards.append(rollout.grade.reward + penalty)
    return rewards


def overlong_penalty(num_tokens: int, *, overlong_tokens: int, max_response_tokens: int) -> float:
    """DAPO's soft over-long punishment (Yu et al., DAPO, 2025, section 3.4); 0 overlong_tokens turn it off.

    With L the longest response and C = overlong_tokens, a response of n tokens gets

        0 for n <= L - C,    (L - C - n) / C from there to L

        >>> [overlong_penalty(n, overlong_tokens=4, max_response_tokens=10) for n in (6, 7, 10)]
        [0.0, -0.25, -1.0]
    """
    num_over = num_tokens - (max_response_tokens - overlong_tokens)
    return -num_over / overlong_tokens if overlong_tokens > 0 and num_over > 0 else 0.0
