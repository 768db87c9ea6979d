from __future__ import annotations

from megatron_orz.rollout_arrays import RolloutArrays
from megatron_orz.types import Rollout, Swap
from tests.rollout.conftest import make_prompts


def test_rollouts_survive_the_wire() -> None:
    prompts = make_prompts(2)
    rollouts = [
        Rollout(
            prompt=prompts[index // 3],
            response_ids=list(range(num_tokens)),
            rollout_log_probs=[-0.5 * token for token in range(num_tokens)],
            finish_reason=reason,
            policy_version=7 + index,
            swaps=(Swap(1, 9), Swap(2, 11)) if index == 4 else (),
        )
        for index, (num_tokens, reason) in enumerate(
            [(3, "stop"), (0, "abort"), (1, "length"), (0, "abort"), (5, "length"), (2, "stop")]
        )
    ]
    assert RolloutArrays.pack(rollouts).unpack(prompts, num_responses=3) == rollouts


def test_no_rollouts_survive_the_wire() -> None:
    assert RolloutArrays.pack([]).unpack([], num_responses=3) == []
