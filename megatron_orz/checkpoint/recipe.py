"""What makes two runs the same: every field of the config but those that only say how it is carried out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_orz.config import Config, to_json

FREE = (
    "run_dir",
    "dry_run",
    "fresh",
    "parallel",
    "fleet",
    "checkpoint",
    "evaluation",
    "reward.num_workers",
    "ppo.num_steps",
    "policy.recompute",
    "policy.optimizer.distributed",
    "critic.recompute",
    "critic.optimizer.distributed",
)
"""Fields, and groups of fields, with which a run may go on changed."""


def flatten(config: Config) -> dict[str, Any]:
    """Every field by its dotted name, as JSON knows it."""
    return dict(_leaves("", json.loads(to_json(config))))


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
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
