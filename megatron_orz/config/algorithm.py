"""The algorithm: steps, advantages, losses, and how responses are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from megatron_orz.config.checks import require
from megatron_orz.types import AdvantageKind, ImportanceLevel, KLEstimator, LossMean

KLPlace: TypeAlias = Literal["loss", "reward"]
Refresh: TypeAlias = Literal["never", "epoch"] | int


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The algorithm. Defaults are the recipe's."""

    num_steps: int
    """PPO iterations: rollouts, then updates."""
    num_prompts: int = 128
    """Prompts per step."""
    num_responses: int = 64
    """Responses per prompt."""
    num_policy_updates: int = 1
    """Mini-batches (optimizer steps) the policy takes on a step's rollouts; 1 is strictly on-policy."""
    num_critic_updates: int = 12
    """Mini-batches (optimizer steps) the critic takes on a step's rollouts."""
    advantages: AdvantageKind = "gae"
    """`gae`: with a critic. Without one, the reward minus the mean over a prompt's responses (`group_centred`), also
    divided by their standard deviation (`group_normalised`), or minus the mean of the others (`leave_one_out`)."""
    gamma: float = 1.0
    gae_lambda: float = 1.0
    """Of the advantages; 0 is the temporal difference alone, 1 the whole return."""
    value_gae_lambda: float | None = None
    """Lambda of the returns that the critic learns, if it differs (decoupled GAE)."""
    gae_alpha: float | None = None
    """Length-adaptive GAE: the advantages of a response of n tokens have lambda 1 - 1 / (gae_alpha n)."""
    num_critic_warmup_steps: int = 0
    """First steps, in which only the critic learns."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a step to mean 0 and variance 1 over all response tokens."""
    clip_eps: float = 0.2
    """Clip range of the probability ratio, below 1 and above."""
    clip_eps_high: float | None = None
    """Clip range above 1, if it differs (clip-higher)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in the loss."""
    overlong_tokens: int = 0
    """Tokens before the longest response allowed, over which the reward falls by 1 (soft over-long penalty)."""
    value_clip_eps: float = 0.2
    """Clip range of the value around its old one; 0 turns value clipping off."""
    importance_cap: float = 0.0
    """A token's loss weighs min(pi_old / pi_rollout, cap), for rollouts of an older policy; 0 leaves the weight out."""
    importance_level: ImportanceLevel = "token"
    """Whether that ratio is of each `token`, or of the whole response, a `sequence` of tokens."""
    max_staleness: int = 0
    """Policy versions rollouts may be behind: 0 waits for the servers; n lets them generate up to n steps ahead."""
    oversampling: float = 0.0
    """Share of extra prompts; a step continues without those answered last, which favours short responses."""
    max_resampling_rounds: int = 0
    """Rounds in which groups of siblings with equal rewards are replaced by those of other prompts; 0 keeps them."""
    loss_mean: LossMean = "token"
    """What the losses are averaged over; the original's released code uses `pack`."""

    @property
    def uses_critic(self) -> bool:
        """Whether the advantages come from a critic."""
        return self.advantages == "gae"

    def num_updates(self, step: int) -> tuple[int, int]:
        """Mini-batches that critic and policy take in a step: no critic takes none, and one warms up alone."""
        num_critic_updates = self.num_critic_updates if self.uses_critic else 0
        return num_critic_updates, self.num_policy_updates if step >= self.num_critic_warmup_steps else 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_prompts", "num_responses", "num_policy_updates", "num_critic_updates"):
            require(getattr(self, name) >= 1, f"ppo.{name} {getattr(self, name)} is not at least 1")
        for name in ("gamma", "gae_lambda", "value_gae_lambda"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"ppo.{name} {value} is outside [0, 1]")
        for name in ("clip_eps", "clip_eps_high", "gae_alpha"):
            value = getattr(self, name)
            require(value is None or value > 0, f"ppo.{name} {value} is not positive")
        for name in ("entropy_coefficient", "overlong_tokens", "num_critic_warmup_steps"):
            require(getattr(self, name) >= 0, f"ppo.{name} {getattr(self, name)} is negative; 0 turns it off")
        require(self.importance_cap >= 0, f"ppo.importance_cap {self.importance_cap} is negative; 0 turns it off")
        require(
            self.importance_cap > 0 or self.importance_level == "token",
            f"ppo.importance_level {self.importance_level} is about weights that ppo.importance_cap 0 leaves out; set "
            "ppo.importance_cap, such as to 2",
        )
        require(self.max_staleness >= 0, f"ppo.max_staleness {self.max_staleness} is negative; 0 waits for the servers")
        require(self.oversampling >= 0, f"ppo.oversampling {self.oversampling} is negative; 0 turns it off")
        rounds = self.max_resampling_rounds
        require(rounds >= 0, f"ppo.max_resampling_rounds {rounds} is negative; 0 turns resampling off")
        require(
            rounds == 0 or self.num_responses > 1,
            f"ppo.max_resampling_rounds {rounds} compares siblings: it needs ppo.num_responses > 1",
        )
        require(self.value_clip_eps >= 0, f"ppo.value_clip_eps {self.value_clip_eps} is negative; 0 turns it off")
        self._check_advantages()

    def _check_advantages(self) -> None:
        require(
            self.gae_alpha is None or self.gae_lambda == 1,
            f"ppo.gae_alpha {self.gae_alpha} makes lambda depend on the length, so that ppo.gae_lambda "
            f"{self.gae_lambda} has no effect; set one of them",
        )
        require(
            self.num_critic_warmup_steps < self.num_steps,
            f"ppo.num_critic_warmup_steps {self.num_critic_warmup_steps} leaves the policy none of the "
            f"{self.num_steps} steps; lower it, or raise ppo.num_steps",
        )
        if self.uses_critic:
            return
        require(
            self.num_responses >= 2,
            f"ppo.advantages {self.advantages} compares the responses of a prompt, but ppo.num_responses is "
            f"{self.num_responses}; raise it to at least 2, or set ppo.advantages to gae",
        )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("gamma", "gae_lambda", "value_gae_lambda", "gae_alpha", "num_critic_warmup_steps"):
            require(
                getattr(self, name) == defaults[name],
                f"ppo.{name} {getattr(self, name)} needs the values of a critic, which ppo.advantages "
                f"{self.advantages} has none of; leave it at {defaults[name]}, or set ppo.advantages to gae",
            )


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty on the divergence of the policy from a reference."""

    coefficient: float = 0.0
    """0: no penalty, and no reference is loaded."""
    estimator: KLEstimator = "k3"
    """k1: log pi - log ref; k2: half its square; k3: ref / pi - 1 + k1. In the loss, k1's gradient is 0 on average."""
    place: KLPlace = "loss"
    """Add it to the loss, or take it from the rewards of the tokens."""
    reference: Path | None = None
    """Hugging Face checkpoint of the reference, usually the policy's own."""
    refresh: Refresh = "never"
    """When the reference takes the policy's weights: after every so many steps, or after each epoch."""

    def __post_init__(self) -> None:
        require(self.coefficient >= 0, f"kl.coefficient {self.coefficient} is negative; 0 turns the penalty off")
        require(
            isinstance(self.refresh, str) or self.refresh >= 1,
            f"kl.refresh {self.refresh} is neither never, nor epoch, nor at least 1 step",
        )
        require(
            self.coefficient == 0 or self.reference is not None,
            f"kl.coefficient {self.coefficient} measures the divergence from a reference, but there is none; set "
            "kl.reference to the checkpoint the policy starts from, or kl.coefficient to 0",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    stop: tuple[str, ...] = ("User:", "Human:", "Assistant:", "</answer>")
    """A response ends after the first of these strings, which stays in it."""

    def __post_init__(self) -> None:
        require(
            self.max_response_tokens >= 1,
            f"sampling.max_response_tokens {self.max_response_tokens} is not at least 1",
        )
        require(self.temperature > 0, f"sampling.temperature {self.temperature} is not positive")
        require(0 < self.top_p <= 1, f"sampling.top_p {self.top_p} is outside (0, 1]")
        require(self.top_k == -1 or self.top_k >= 1, f"sampling.top_k {self.top_k} is neither -1 nor positive")
        require("" not in self.stop, f"sampling.stop {self.stop} holds an empty text; leave it out")
