"""Every knob of a run, as nested frozen dataclasses that check themselves on construction.

A recipe in `examples/` builds one complete `Config`; tyro lets the command line change any field
(`--ppo.num-steps 10`). What depends on the machine (world size, heads of the model) is checked by
`ParallelConfig.check_world_size` and by the engine, before any model is built.
"""

from typing import TypeAlias

from megatron_orz.config.algorithm import KLConfig, KLPlace, PPOConfig, Refresh, SamplingConfig
from megatron_orz.config.data import DataConfig, EvaluationConfig, RewardConfig
from megatron_orz.config.fleet import FleetConfig, FleetKind, TransportKind, Verification
from megatron_orz.config.models import (
    CriticConfig,
    DType,
    LRDecay,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    ValueHeadInit,
)
from megatron_orz.config.outputs import CheckpointConfig, GenerationsConfig, Tracker, TrackingConfig
from megatron_orz.config.run import Config, to_json
from megatron_orz.config.supervised import ConversationConfig, SupervisedConfig

RunConfig: TypeAlias = Config | SupervisedConfig
"""Either kind of run."""

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConversationConfig",
    "CriticConfig",
    "DType",
    "DataConfig",
    "EvaluationConfig",
    "FleetConfig",
    "FleetKind",
    "GenerationsConfig",
    "KLConfig",
    "KLPlace",
    "LRDecay",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ParallelConfig",
    "Recompute",
    "Refresh",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "SupervisedConfig",
    "Tracker",
    "TrackingConfig",
    "TransportKind",
    "ValueHeadInit",
    "Verification",
    "to_json",
]
