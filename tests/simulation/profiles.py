"""A profile small enough to calculate with by hand."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_orz.simulation.course import Setting
from megatron_orz.simulation.profile import Decoding, Profile, Training


def small_profile(**changes: Any) -> Profile:
    """8 prompts of 2 responses, all of 10 tokens after a prompt of 6; one GPU for a server or a replica; no noise.

    Decoding 16 responses on one server takes 10 (2 + 16 x 0.25) = 60 s; a sequence fills 6 + 10 - 1 = 15 positions of a
    pack, so that training takes 240 (0.01 + 0.02 + 0.03) + 3 x 1 = 17.4 s on one GPU.
    """
    values: dict[str, Any] = {
        "name": "small",
        "groups": [[10]],
        "prompt_tokens": 6.0,
        "num_prompts": 8,
        "num_responses": 2,
        "max_pack_tokens": 60,
        "decoding": Decoding(iteration_s=2.0, response_s=0.25, max_running=64),
        "training": Training(
            infer_s=0.01, critic_s=0.02, policy_s=0.03, update_s=1.0, num_critic_updates=2, num_policy_updates=1
        ),
        "gpus_per_server": 1,
        "gpus_per_replica": 1,
        "sync_s": 3.0,
        "rollout_s": 0.0,
        "switch_s": 0.5,
        "trainer_spread": [1.0],
        "server_spread": [1.0],
    } | changes
    values["sources"] = {field.name: "chosen" for field in fields(Profile)}
    return Profile(**values)


def small_setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {"trainer_gpus": 1, "server_gpus": 1, "num_prompts": 8, "num_responses": 2} | changes
    return Setting(**values)
