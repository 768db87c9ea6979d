"""Whether trainer and servers fit on the same GPUs, in each of the moments of a colocated step."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_orz.config import Config, ModelConfig
from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.memory import BYTES, ModelMemory, kv_cache_bytes, model_memory, num_parameters

GIB = 2**30
TRAINER_RESIDUE = 2 * GIB
"""What an offloaded trainer keeps: CUDA context, communication buffers, the allocator's gaps. An allowance."""
SERVER_RESIDUE = 2 * GIB
"""What a sleeping server keeps: CUDA context, communication buffers, captured graphs. An allowance."""
NOTHING = ModelMemory(weights=0, gradients=0, optimizer=0, activations=0)
BUCKET = GIB // 16
"""Of the two buckets of weights on their way; a larger tensor has one of its own size."""


def check_colocated(
    config: Config, policy: Architecture, critic: Architecture | None, *, world_size: int, gpu_bytes: int
) -> None:
    """Raises ValueError with the sums of the first moment that does not fit into `gpu_bytes`.

    Every stage of the pipeline meets the servers on the GPUs of another rank, so that the fullest one counts.
    """
    for moment, parts in moments(config, policy, critic, world_size=world_size, gpu_bytes=gpu_bytes).items():
        needed = sum(parts.values())
        if needed > gpu_bytes:
            sums = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
            raise ValueError(
                f"fleet.colocated needs {needed / GIB:.1f} GiB of each GPU's {gpu_bytes / GIB:.1f} GiB {moment} "
                f"({sums}); raise fleet.server_tp or parallel.tp, lower fleet.gpu_memory_share or "
                "data.max_pack_tokens, or set recompute"
            )
    share = int(config.fleet.gpu_memory_share * gpu_bytes)
    weights = _server_weights(config, policy)
    longest = kv_cache_bytes(
        policy,
        num_tokens=config.fleet.max_model_tokens,
        server_tp=config.fleet.server_tp,
        num_bytes=_server_bytes(config),
    )
    if weights + longest > share:
        raise ValueError(
            f"fleet.gpu_memory_share {config.fleet.gpu_memory_share} is {share / GIB:.1f} GiB, too little for the "
            f"server's weights {weights / GIB:.1f} GiB and the cache of one response {longest / GIB:.1f} GiB; "
            "raise it or fleet.server_tp, or lower fleet.max_model_tokens"
        )


def moments(
    config: Config, policy: Architecture, critic: Architecture | None, *, world_size: int, gpu_bytes: int
) -> dict[str, Mapping[str, int]]:
    """Bytes on the fullest GPU by what takes them, for each moment of a step."""
    models = [
        (
            _memory(config, config.policy, policy, stage, world_size, value_head=False),
            _memory(config, config.critic, critic, stage, world_size, value_head=True)
            if critic and config.critic
            else NOTHING,
        )
        for stage in range(config.parallel.pp)
    ]
    # A reference is the policy's weights once more.
    has_reference = config.kl.coefficient > 0
    reference = max(of_policy.weights for of_policy, _ in models) if has_reference else 0
    resident = reference + max(of_policy.resident + of_critic.resident for of_policy, of_critic in models)
    training = reference + max(
        of_policy.resident + of_critic.resident + max(of_policy.activations, of_critic.activations)
        for of_policy, of_critic in models
    )
    buckets = update_buckets(policy, _server_bytes(config))
    return {
        "while it trains": {"trainer": training, "buckets": buckets, "sleeping server": SERVER_RESIDUE},
        "during an update": {
            "trainer": resident,
            "server's weights": _server_weights(config, policy),
            "buckets": buckets,
            "rest of the server": SERVER_RESIDUE,
        },
        "while it generates": {
            "server": int(config.fleet.gpu_memory_share * gpu_bytes),
            "buckets": buckets,
            "offloaded trainer": TRAINER_RESIDUE,
        },
    }


def update_buckets(policy: Architecture, num_bytes: int) -> int:
    """Bytes of both buckets, which stay between updates, where the embedding and the head have one each.

    num_bytes: of one weight on its way.
    """
    return 2 * max(BUCKET, policy.vocab_size * policy.hidden_size * num_bytes)


def _server_weights(config: Config, policy: Architecture) -> int:
    """Bytes on one of a server's GPUs."""
    return num_parameters(policy) * _server_bytes(config) // config.fleet.server_tp


def _server_bytes(config: Config) -> int:
    """Of one of a server's weights."""
    return BYTES[config.fleet.dtype or config.policy.dtype]


def _memory(
    config: Config, model: ModelConfig, architecture: Architecture, stage: int, world_size: int, *, value_head: bool
) -> ModelMemory:
    return model_memory(
        architecture,
        config.parallel,
        stage,
        world_size=world_size,
        pack_tokens=config.data.max_pack_tokens,
        dtype=model.dtype,
        recompute=model.recompute,
        value_head=value_head,
        distributed_optimizer=model.optimizer.distributed,
    )
