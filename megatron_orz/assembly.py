"""The parts of a run, put together as the config asks: models, and the wrappers of its options around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_orz import ppo
from megatron_orz.ahead import GenerationAhead
from megatron_orz.algorithms.algorithm import Absent
from megatron_orz.colocation import ColocatedFleet, ColocatedModel, ColocatedPolicy, ColocatedReference, Turns
from megatron_orz.config import Config
from megatron_orz.data.prompts import PromptStream
from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.random_state import RandomState
from megatron_orz.engine.reference import ReferenceEngine
from megatron_orz.logs import RunLog
from megatron_orz.resampling import DynamicSampling, Oversampling
from megatron_orz.rollout.fleet import ServerFleet
from megatron_orz.timeline import Timeline
from megatron_orz.types import Critic, Fleet, Grader, Policy, Reference, Stateful


@dataclass(frozen=True, kw_only=True)
class Models:
    """The engines of a run. An algorithm that uses no critic has none, and so with the reference."""

    policy: PolicyEngine
    critic: CriticEngine | None
    reference: ReferenceEngine | None

    def by_name(self) -> dict[str, PolicyEngine | CriticEngine]:
        """Those that are there."""
        named = {"policy": self.policy, "critic": self.critic, "reference": self.reference}
        return {name: model for name, model in named.items() if model is not None}

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds of them, by name."""
        return {"random": RandomState(self.policy.mesh.rank), **self.by_name()}


def build_models(config: Config, mesh: Mesh, *, num_prompts: int) -> Models:
    """Builds what the algorithm uses, and no more. num_prompts: in the training data, which makes an epoch."""
    ppo_config, temperature = config.ppo, config.sampling.temperature
    loss_mean, max_response_tokens = ppo_config.loss_mean, config.sampling.max_response_tokens
    policy = PolicyEngine(
        config.policy, mesh, loss_mean=loss_mean, max_response_tokens=max_response_tokens, temperature=temperature
    )
    critic = None
    if config.critic is not None and ppo_config.uses_critic:
        critic = CriticEngine(
            config.critic, mesh, loss_mean=loss_mean, max_response_tokens=max_response_tokens, seed=config.seed
        )
    reference = None
    if config.kl.coefficient > 0:
        epoch_steps = max(1, num_prompts // ppo_config.num_prompts)
        reference = ReferenceEngine(
            config.kl, config.policy, mesh, policy=policy, temperature=temperature, epoch_steps=epoch_steps
        )
    return Models(policy=policy, critic=critic, reference=reference)


def model_paths(config: Config) -> dict[str, Path]:
    """Where each model of a run starts from, by name; those that the algorithm does not build among them."""
    paths = {"policy": config.policy.path}
    if config.critic is not None:
        paths["critic"] = config.critic.path
    if config.kl.reference is not None:
        paths["reference"] = config.kl.reference
    return paths


def with_options(
    config: Config,
    fleet: Fleet,
    grader: Grader,
    prompts: PromptStream,
    log: RunLog,
    timeline: Timeline | None,
    *,
    is_main: bool,
) -> tuple[Fleet, Grader]:
    """The fleet and the grader of the training steps, with the options of `resampling` and `ahead`."""
    step_fleet, step_grader = fleet, grader
    if config.ppo.oversampling and isinstance(fleet, ServerFleet):
        step_fleet = oversampling = Oversampling(fleet, prompts, share=config.ppo.oversampling)
        log.include(oversampling.metrics)
    if config.ppo.max_staleness and isinstance(fleet, ServerFleet):
        last_seed = ppo.rollout_seed(config.seed, config.ppo.num_steps - 1)
        on_span = timeline.on_servers if timeline is not None else None
        step_fleet = ahead = GenerationAhead(
            fleet,
            prompts,
            max_staleness=config.ppo.max_staleness,
            last_seed=last_seed,
            waits_for_responses=not config.fleet.swaps_within_responses,
            is_main=is_main,
            progress=log.progress,
            on_span=on_span,
        )
        log.include(ahead.metrics)
    if config.ppo.max_resampling_rounds:
        step_grader = dynamic = DynamicSampling(
            grader,
            step_fleet,
            prompts,
            num_responses=config.ppo.num_responses,
            max_rounds=config.ppo.max_resampling_rounds,
            seed=config.seed,
        )
        log.include(dynamic.metrics)
    return step_fleet, step_grader


def in_turns(
    config: Config, models: Models, fleet: Fleet, step_fleet: Fleet, log: RunLog
) -> tuple[Policy, Critic, Reference, Fleet]:
    """Models and fleet as the loop sees them: they take turns where they share their GPUs.

    fleet: whose servers sleep; step_fleet: what the options made of it.
    """
    policy, critic, reference = models.policy, models.critic, models.reference
    if not (config.fleet.colocated and isinstance(fleet, ServerFleet)):
        return policy, critic or Absent(), reference or Absent(), step_fleet
    turns = Turns(fleet, [model for model in (policy, critic, reference) if model is not None])
    log.include(turns.metrics)
    return (
        ColocatedPolicy(policy, turns),
        ColocatedModel(critic, turns) if critic else Absent(),
        ColocatedReference(reference, turns) if reference else Absent(),
        ColocatedFleet(step_fleet, turns),
    )
