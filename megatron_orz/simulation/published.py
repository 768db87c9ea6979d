"""Profiles of recipes on GPUs that nobody here has measured: from published figures and from arithmetic, as each says.

They order layouts, and show what asynchrony is worth; a profile of runs of one's own predicts seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_orz.simulation.profile import Decoding, Profile, Training

FLOPS = 989e12
"""Dense bfloat16 peak of an H800, per second (NVIDIA's data sheet)."""
HBM_BYTES_PER_S = 3.35e12
LINK_BYTES_PER_S = 50e9
"""One 400 Gbit/s port for each GPU."""
TRAINING_SHARE = 0.35
DECODING_SHARE = 0.5
BANDWIDTH_SHARE = 0.8
LAUNCH_S = 1e-3
"""Of an iteration: scheduling, sampling, kernel launches."""

PROMPT_TOKENS = 250.0
MEAN_RESPONSE_TOKENS = 1500.0
MAX_RESPONSE_TOKENS = 8000
LOG_SPREAD_OF_PROMPTS = 0.55
LOG_SPREAD_OF_SIBLINGS = 0.55


@dataclass(frozen=True, kw_only=True)
class _Model:
    num_parameters: float
    kv_bytes: float
    """Keys and values of a token."""
    gpus_per_server: int
    gpus_per_replica: int
    sync_s: float
    sync_source: str


_MODELS: Mapping[str, _Model] = {
    "orz-7b-h800": _Model(
        num_parameters=7.6e9,
        kv_bytes=2 * 28 * 4 * 128 * 2,
        gpus_per_server=1,
        gpus_per_replica=4,
        sync_s=5.75,
        sync_source="verl's documentation: 5.5 to 6.0 s for Qwen2.5-7B over NCCL on 2 nodes of H100",
    ),
    "orz-32b-h800": _Model(
        num_parameters=32.8e9,
        kv_bytes=2 * 64 * 8 * 128 * 2,
        gpus_per_server=4,
        gpus_per_replica=16,
        sync_s=14.2,
        sync_source="verl's documentation: 14.2 s for Qwen2.5-32B over NCCL on 4 nodes of H100",
    ),
}
NAMES = tuple(_MODELS)


def published_profile(name: str) -> Profile:
    """A profile by its name. Raises ValueError for one that there is not."""
    if name not in _MODELS:
        raise ValueError(f"there is no profile {name!r}; give one of {', '.join(NAMES)}, or the directory of a run")
    model = _MODELS[name]
    context = PROMPT_TOKENS + MEAN_RESPONSE_TOKENS / 2
    iteration_s = 2 * model.num_parameters / model.gpus_per_server / HBM_BYTES_PER_S / BANDWIDTH_SHARE + LAUNCH_S
    response_s = (
        model.kv_bytes * context / HBM_BYTES_PER_S / BANDWIDTH_SHARE + 2 * model.num_parameters / FLOPS / DECODING_SHARE
    ) / model.gpus_per_server
    forward_s = 2 * model.num_parameters / FLOPS / TRAINING_SHARE
    training = Training(
        infer_s=forward_s,
        critic_s=3 * forward_s,
        policy_s=3 * forward_s,
        update_s=2 * 4 * model.num_parameters / model.gpus_per_replica / LINK_BYTES_PER_S,
        num_critic_updates=12,
        num_policy_updates=1,
    )
    recipe = "the recipe (docs/recipe.md)"
    return Profile(
        name=name,
        groups=_log_normal_groups(),
        prompt_tokens=PROMPT_TOKENS,
        num_prompts=128,
        num_responses=64,
        max_pack_tokens=16384,
        decoding=Decoding(iteration_s=iteration_s, response_s=response_s, max_running=1024),
        training=training,
        gpus_per_server=model.gpus_per_server,
        gpus_per_replica=model.gpus_per_replica,
        sync_s=model.sync_s,
        rollout_s=5.5e-5,
        switch_s=2.0,
        trainer_spread=[0.98, 1.0, 1.02],
        server_spread=[0.95, 1.0, 1.05],
        sources={
            "groups": f"assumed: log-normal, {MEAN_RESPONSE_TOKENS:g} tokens on average, cut at {MAX_RESPONSE_TOKENS} "
            f"(the recipe's limit); standard deviation of the logarithm {LOG_SPREAD_OF_PROMPTS} between prompts and "
            f"{LOG_SPREAD_OF_SIBLINGS} between siblings",
            "prompt_tokens": "assumed: the recipe's template and a problem",
            "num_prompts": recipe,
            "num_responses": recipe,
            "max_pack_tokens": recipe,
            "decoding": f"arithmetic: weights, keys and values read at {BANDWIDTH_SHARE:.0%} of {HBM_BYTES_PER_S:.3g} "
            f"B/s, 2 FLOP a parameter and token at {DECODING_SHARE:.0%} of {FLOPS:.3g}, {LAUNCH_S:g} s of launches; "
            "both shares assumed; max_running: vLLM's default on an H100",
            "training": f"arithmetic: 2 FLOP a parameter and token forward and 4 backward at {TRAINING_SHARE:.0%} of "
            f"{FLOPS:.3g} (assumed; prime-rl publishes 14.7 % to 36.1 %), policy and critic alike; the critic alone "
            "infers, because the policy's only update does so by itself; an update sums float32 gradients at "
            f" {LINK_BYTES_PER_S:.3g} B/s; number of updates: {recipe}",
            "gpus_per_server": recipe,
            "gpus_per_replica": "tools/plan.py layout",
            "sync_s": model.sync_source,
            "rollout_s": "measured on the demo (docs/planning.md)",
            "switch_s": "assumed",
            "trainer_spread": "assumed",
            "server_spread": "assumed",
        },
    )


def _log_normal_groups(num_groups: int = 512, num_siblings: int = 64) -> list[list[int]]:
    """Lengths whose mean, after they are cut, is MEAN_RESPONSE_TOKENS."""
    rng = np.random.default_rng(0)
    of_prompts = rng.normal(0.0, LOG_SPREAD_OF_PROMPTS, (num_groups, 1))
    factors = np.exp(of_prompts + rng.normal(0.0, LOG_SPREAD_OF_SIBLINGS, (num_groups, num_siblings)))
    scale = MEAN_RESPONSE_TOKENS
    for _ in range(50):  # a fixed point: what is cut is made up for by the rest
        scale *= MEAN_RESPONSE_TOKENS / np.minimum(scale * factors, MAX_RESPONSE_TOKENS).mean()
    return np.clip(np.rint(scale * factors), 1, MAX_RESPONSE_TOKENS).astype(int).tolist()
