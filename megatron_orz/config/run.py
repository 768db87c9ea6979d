"""One run, complete."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_orz.config.algorithm import KLConfig, PPOConfig, SamplingConfig
from megatron_orz.config.checks import check_numbers, require
from megatron_orz.config.data import DataConfig, EvaluationConfig, RewardConfig
from megatron_orz.config.fleet import FleetConfig
from megatron_orz.config.models import CriticConfig, ModelConfig, ParallelConfig
from megatron_orz.config.outputs import CheckpointConfig, GenerationsConfig, TrackingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, complete."""

    run_dir: Path
    """Everything the run writes: metrics, curves, config.json, checkpoints."""
    policy: ModelConfig
    critic: CriticConfig | None
    """Built only where `ppo.advantages` uses it; None where a recipe has none."""
    ppo: PPOConfig
    sampling: SamplingConfig
    data: DataConfig
    kl: KLConfig = field(default_factory=KLConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    generations: GenerationsConfig = field(default_factory=GenerationsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    deterministic: bool = False
    """The same config and seed give the same bits on the same machine, at some cost in speed; `local` fleet only."""
    hang_timeout_s: float = 1800.0
    """The run ends when nothing moves on any rank for this long: no rollout, no grade, no mini-batch is finished."""
    fresh: bool = False
    """Start over: set aside what run_dir holds, instead of resuming from its last checkpoint."""
    dry_run: bool = False
    """Check everything that can be checked without building a model, print the resolved config and a plan, and stop."""
    debug: bool = False
    """Scale the recipe down to one machine: few prompts, short responses, one update. Other options still apply."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.seed >= 0, f"seed {self.seed} is negative; set it to 0 or more")
        require(
            not self.deterministic or self.fleet.kind == "local",
            f"deterministic needs fleet.kind local, not {self.fleet.kind}: what a server computes together depends on "
            "when requests arrive; set fleet.kind, or turn deterministic off",
        )
        self.fleet.check_longest(
            max_prompt_tokens=self.data.max_prompt_tokens,
            max_response_tokens=self.sampling.max_response_tokens,
            prompt_option="data.max_prompt_tokens",
        )
        if self.ppo.max_staleness:
            require(
                self.fleet.kind != "local" and not self.fleet.colocated,
                f"ppo.max_staleness {self.ppo.max_staleness} needs servers that compute beside the trainer; set it to "
                "0, or fleet.kind to vllm and fleet.colocated to false",
            )
            require(
                not self.ppo.oversampling and not self.ppo.max_resampling_rounds,
                f"ppo.max_staleness {self.ppo.max_staleness} asks for prompts steps ahead, which ppo.oversampling and "
                "ppo.max_resampling_rounds would change; set either to 0",
            )
        require(
            not self.fleet.swaps_within_responses or self.ppo.max_staleness > 0,
            "fleet.swaps_within_responses is about responses under way during an update, and ppo.max_staleness 0 waits "
            "for all of them; raise ppo.max_staleness, or set fleet.swaps_within_responses to false",
        )
        require(
            self.fleet.kind != "local" or self.ppo.oversampling == 0,
            f"ppo.oversampling {self.ppo.oversampling} needs servers, which answer prompts apart; "
            "set it to 0, or use --fleet.kind vllm",
        )
        require(
            self.fleet.kind != "sglang" or (self.sampling.top_p == 1.0 and self.sampling.top_k == -1),
            f"SGLang's log-probabilities leave out sampling.top_p {self.sampling.top_p} and sampling.top_k "
            f"{self.sampling.top_k}: they would not be those of the responses; use 1.0 and -1, or --fleet.kind vllm",
        )
        served = self.fleet.dtype or self.policy.dtype
        require(
            not self.fleet.delta or bool(self.fleet.urls) or served == "bfloat16",
            f"fleet.delta saves nothing with {served} servers, as nearly all such weights change at every step; set "
            "fleet.dtype to bfloat16, or fleet.delta to false",
        )
        longest, multiple = self.data.max_prompt_tokens + self.sampling.max_response_tokens, self.parallel.pack_multiple
        least = -(-longest // multiple) * multiple
        require(
            least <= self.data.max_pack_tokens,
            f"a prompt of {self.data.max_prompt_tokens} tokens and a response of {self.sampling.max_response_tokens} "
            f"do not fit data.max_pack_tokens {self.data.max_pack_tokens}; raise it to at least {least}",
        )
        for name, deadline_s in (
            ("parallel.timeout_s", self.parallel.timeout_s),
            ("fleet.start_timeout_s", self.fleet.start_timeout_s),
            ("fleet.request_timeout_s", self.fleet.request_timeout_s),
            ("fleet.update_timeout_s", self.fleet.update_timeout_s),
        ):
            require(
                self.hang_timeout_s > deadline_s,
                f"hang_timeout_s {self.hang_timeout_s:g} is not above {name} {deadline_s:g}, whose end says more of "
                "what hangs; raise hang_timeout_s",
            )
        for name, model in (("policy", self.policy), ("critic", self.critic)):
            require(
                model is None or model.optimizer.decay == "constant" or model.optimizer.decay_steps is not None,
                f"{name}.optimizer.decay needs {name}.optimizer.decay_steps: a run may be made longer, and its "
                "learning rate must not depend on that; set it, or leave the rate constant",
            )
        num_rollouts = self.ppo.num_prompts * self.ppo.num_responses
        num_updates = max(self.ppo.num_updates(step=self.ppo.num_steps))
        require(
            num_rollouts >= num_updates,
            f"{num_rollouts} rollouts a step cannot be split into {num_updates} mini-batches; "
            "raise ppo.num_prompts, or lower ppo.num_critic_updates and ppo.num_policy_updates",
        )
        require(
            self.critic is not None or not self.ppo.uses_critic,
            "ppo.advantages gae needs the values of a critic, but critic is None; set critic to a CriticConfig, or "
            "ppo.advantages to group_normalised",
        )
        require(
            self.ppo.overlong_tokens < self.sampling.max_response_tokens,
            f"ppo.overlong_tokens {self.ppo.overlong_tokens} leaves nothing of sampling.max_response_tokens "
            f"{self.sampling.max_response_tokens} without a penalty; lower it",
        )


def to_json(config: Any) -> str:
    """A config dataclass as indented JSON, paths as text."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
