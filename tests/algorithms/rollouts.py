"""Graded rollouts of chosen prompts, lengths and rewards."""

from megatron_orz.types import Grade, Prompt, Rollout


def graded(prompt_id: int, reward: float, *, length: int = 2) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, token_ids=[1, 2], answer="", source="test"),
        response_ids=[3] * length,
        rollout_log_probs=[-0.5] * length,
        finish_reason="stop",
        policy_version=0,
        grade=Grade(reward=reward, is_correct=reward > 0, is_formatted=True, timed_out=False, extracted=None),
    )
