"""A recipe at a size that one machine runs in minutes: every part at work, nothing learnt."""

from __future__ import annotations

from dataclasses import replace

from megatron_orz.config import Config, ParallelConfig

NUM_STEPS, NUM_PROMPTS, NUM_RESPONSES = 2, 4, 4
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, MAX_PACK_TOKENS = 1024, 128, 2048
NUM_HELD_OUT = 4


def scaled_down(recipe: Config) -> Config:
    """Few steps, prompts and responses, short ones, one update of each model, one rank and one server.

    What is smaller already stays, models and data with it. The run goes to a directory of its own.
    """
    ppo, data, sampling, fleet, evaluation = recipe.ppo, recipe.data, recipe.sampling, recipe.fleet, recipe.evaluation
    max_response_tokens = min(sampling.max_response_tokens, MAX_RESPONSE_TOKENS)
    return replace(
        recipe,
        debug=True,
        run_dir=recipe.run_dir.with_name(f"{recipe.run_dir.name}-debug"),
        parallel=ParallelConfig(),
        ppo=replace(
            ppo,
            num_steps=min(ppo.num_steps, NUM_STEPS),
            num_prompts=min(ppo.num_prompts, NUM_PROMPTS),
            num_responses=min(ppo.num_responses, NUM_RESPONSES),
            num_policy_updates=1,
            num_critic_updates=1,
            num_critic_warmup_steps=min(ppo.num_critic_warmup_steps, 1),
            overlong_tokens=min(ppo.overlong_tokens, max_response_tokens // 2),
        ),
        sampling=replace(sampling, max_response_tokens=max_response_tokens),
        data=replace(
            data,
            max_prompt_tokens=min(data.max_prompt_tokens, MAX_PROMPT_TOKENS),
            max_pack_tokens=min(data.max_pack_tokens, MAX_PACK_TOKENS),
        ),
        fleet=replace(
            fleet,
            urls=(),
            gpus=(),
            num_servers=1,
            server_tp=1,
            min_servers=1,
            max_model_tokens=min(fleet.max_model_tokens, MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS),
        ),
        evaluation=replace(
            evaluation, num_responses=1, max_prompts=min(evaluation.max_prompts or NUM_HELD_OUT, NUM_HELD_OUT)
        ),
    )
