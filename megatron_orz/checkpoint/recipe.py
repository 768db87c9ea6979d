"""What makes two runs the same: the training prompts, and the config but for what says how a run is carried out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_orz.config import RunConfig, to_json
from megatron_orz.types import Prompt

FREE = (
    "run_dir",
    "dry_run",
    "fresh",
    "parallel",
    "fleet",
    "checkpoint",
    "evaluation",
    "generations",
    "tracking",
    "hang_timeout_s",
    "reward.num_workers",
    "ppo.num_steps",
    "policy.recompute",
    "policy.optimizer.distributed",
    "critic.recompute",
    "critic.optimizer.distributed",
    "model.recompute",
    "model.optimizer.distributed",
    "data.held_out",
    "held_out_interval",
)
"""Fields, and groups of fields, with which a run may go on changed."""


def recipe_of(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Every field by its dotted name, as JSON knows it, and a digest of the training prompts as `data.content`."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.prompt_id, prompt.token_ids, prompt.answer)).encode())
    return leaves(json.loads(to_json(config))) | {"data.content": digest.hexdigest()[:16]}


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a config.json by its dotted name."""
    return dict(_leaves("", config))


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [leaf for name, inner in value.items() for leaf in _leaves(f"{prefix}.{name}".lstrip("."), inner)]


def differences(recipe: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """How a recipe differs from the one a checkpoint was saved with, in words.

    Fields that only one of them knows belong to another version of the program, and are passed over.
    """
    return [
        f"{name} is {json.dumps(value)}, was {json.dumps(saved[name])}"
        for name, value in recipe.items()
        if name in saved and saved[name] != value and not _is_free(name)
    ]


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)
