"""A dry run: checks a recipe, builds nothing, and says what it asks of the machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_orz.checks import check_architecture, check_models, read_data
from megatron_orz.command_line import rank, world_size
from megatron_orz.config import Config, ModelConfig, to_json
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.memory import BYTES, ModelMemory, fullest_stage, num_parameters

GIB = 2**30


def dry_run(config: Config, *, published_models: Path | None = None) -> None:
    """Checks all that can be checked without building a model; prints the config, and to stderr the plan.

    published_models: see `train.main`. Where a model is not there but its published config is, the layout and the plan
    are those of that config, and tokenizer and data go unchecked.
    """
    num_ranks = world_size()
    if num_ranks == 1 and config.parallel.num_ranks is not None:
        num_ranks = config.parallel.num_ranks
    config.parallel.check_world_size(num_ranks)
    paths = {"policy": config.policy.path}
    if config.critic is not None and config.ppo.uses_critic:
        paths["critic"] = config.critic.path
    if config.kl.coefficient > 0 and config.kl.reference is not None:
        paths["reference"] = config.kl.reference
    sources = {name: _source(path, published_models) for name, path in paths.items()}
    absent = sorted({str(path) for name, path in paths.items() if path != sources[name]})
    if absent:
        _say(f"not there, so that tokenizer and data are not checked: {', '.join(absent)}")
    else:
        read_data(config, check_models(config))
    architectures = {name: read_architecture(source) for name, source in sources.items()}
    for name, architecture in architectures.items():
        check_architecture(config, architecture, sources[name])
    _say(plan(config, architectures, num_ranks).describe(config))
    if rank() == 0:
        print(to_json(config), end="")


def _source(path: Path, published_models: Path | None) -> Path:
    """Where to read what a model looks like: in its checkpoint, or in its absence in the published config."""
    if published_models is None or path.exists():
        return path
    published = published_models / path.name
    return published if (published / "config.json").exists() else path


def _say(text: str) -> None:
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe takes of each of `num_ranks` GPUs."""

    num_ranks: int
    dp: int
    models: dict[str, ModelMemory]
    """On the pipeline stage where each takes most; a reference has weights alone."""
    delta_copy: int
    """Bytes of the copy of the policy that both sides of a weight update keep in host memory; 0 without fleet.delta."""

    @property
    def activations(self) -> int:
        """Of the one model that trains at a time."""
        return max(memory.activations for memory in self.models.values())

    @property
    def training(self) -> int:
        """Bytes of a GPU at the peak of a training step."""
        return sum(memory.resident for memory in self.models.values()) + self.activations

    def describe(self, config: Config) -> str:
        """A line each on the layout, the memory, the tokens and the updates of a step."""
        parallel, ppo, data = config.parallel, config.ppo, config.data
        grid = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp": self.dp}
        parts = {name: memory.resident for name, memory in self.models.items()} | {"activations": self.activations}
        longest = data.max_prompt_tokens + config.sampling.max_response_tokens - 1
        num_rollouts = ppo.num_prompts * ppo.num_responses
        in_a_pack = data.max_pack_tokens // parallel.pack_multiple * parallel.pack_multiple // longest
        num_packs = -(-num_rollouts // (self.dp * in_a_pack))
        num_critic_updates, num_policy_updates = ppo.num_updates(ppo.num_steps)
        delta = (
            f"host memory of fleet.delta: {self.delta_copy / GIB:.1f} GiB on every rank that sends weights, and in "
            "every worker of every server"
        )
        return "\n".join(
            [
                f"layout: {self.num_ranks} GPUs = " + " x ".join(f"{name} {size}" for name, size in grid.items()),
                "memory of a GPU while training: "
                + " + ".join(f"{name} {num_bytes / GIB:.1f}" for name, num_bytes in parts.items())
                + f" = {self.training / GIB:.1f} GiB",
                *([delta] if self.delta_copy else []),
                f"tokens of a step: {ppo.num_prompts} prompts x {ppo.num_responses} responses of at most {longest} "
                f"tokens are at most {num_rollouts * longest:,}; if all were as long, a rank would have {num_packs:,} "
                f"packs of {data.max_pack_tokens:,}",
                f"updates of a step: {num_policy_updates} of the policy, {num_critic_updates} of the critic",
            ]
        )


def plan(config: Config, architectures: dict[str, Architecture], num_ranks: int) -> Plan:
    """The plan for the models a run builds, by name: policy, critic, reference."""
    parallel = config.parallel
    return Plan(
        num_ranks=num_ranks,
        dp=num_ranks // (parallel.tp * parallel.pp * parallel.cp),
        models={
            name: _memory(config, _config_of(config, name), architecture, num_ranks, name)
            for name, architecture in architectures.items()
        },
        delta_copy=num_parameters(architectures["policy"]) * BYTES["bfloat16"] if config.fleet.delta else 0,
    )


def _config_of(config: Config, name: str) -> ModelConfig:
    return config.critic if name == "critic" and config.critic is not None else config.policy


def _memory(config: Config, model: ModelConfig, architecture: Architecture, num_ranks: int, name: str) -> ModelMemory:
    whole = fullest_stage(
        architecture,
        config.parallel,
        world_size=num_ranks,
        pack_tokens=config.data.max_pack_tokens,
        dtype=model.dtype,
        recompute=model.recompute,
        value_head=name == "critic",
        distributed_optimizer=model.optimizer.distributed,
    )
    if name != "reference":
        return whole
    return ModelMemory(weights=whole.weights, gradients=0, optimizer=0, activations=0)
