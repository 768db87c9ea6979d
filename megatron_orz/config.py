"""Every knob of a run, as nested frozen dataclasses that check themselves on construction.

A recipe in `examples/` builds one complete `Config`; tyro lets the command line change any field
(`--ppo.num-steps 10`). What depends on the machine (world size, heads of the model) is checked by
`ParallelConfig.check_world_size` and by the engine, before any model is built.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_orz.types import AdvantageKind, KLEstimator, LossMean

DType: TypeAlias = Literal["float32", "bfloat16"]
FleetKind: TypeAlias = Literal["vllm", "sglang", "local"]
TransportKind: TypeAlias = Literal["auto", "ipc", "nccl", "gloo", "disk"]
Verification: TypeAlias = Literal["sampled", "full", "off"]
Recompute: TypeAlias = Literal["none", "selective", "full"]
KLPlace: TypeAlias = Literal["loss", "reward"]
Refresh: TypeAlias = Literal["never", "epoch"] | int
Tracker: TypeAlias = Literal["wandb", "trackio"]
ValueHeadInit: TypeAlias = Literal["normal", "uniform"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


MAX_TIMEOUT_S = 1e6
"""The longest deadline, eleven days: some waits count milliseconds in 32 bits."""


def _check_numbers(section: Any, place: str = "") -> None:
    """Raises ValueError for numbers that are none, and for deadlines that never come, in a section and those below."""
    for field_ in dataclasses.fields(section):
        name, value = f"{place}{field_.name}", getattr(section, field_.name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value, f"{name}.")
        elif isinstance(value, float):
            _require(math.isfinite(value), f"{name} {value} is not a finite number")
        if name.endswith("timeout_s"):
            _require(
                0 < value <= MAX_TIMEOUT_S, f"{name} {value:g} is not a deadline: it must be above 0, and at most 1e6 s"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant rate."""

    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0 to `lr`."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only: biases, norms and the value head are not decayed."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer states over the data-parallel ranks."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"lr {self.lr} is not positive")
        _require(self.warmup_steps >= 0, f"warmup_steps {self.warmup_steps} is negative; 0 means none")
        _require(self.clip_grad >= 0, f"clip_grad {self.clip_grad} is negative; 0 turns clipping off")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _require(0 <= beta < 1, f"{name} {beta} is outside [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Megatron model: where its weights come from, and how it is trained."""

    path: Path
    """Hugging Face checkpoint directory (config.json, safetensors, tokenizer); a critic's may be a Megatron one."""
    optimizer: OptimizerConfig
    dtype: DType = "float32"
    """Type of the weights in the forward pass; the optimizer keeps float32 copies of bfloat16 weights."""
    recompute: Recompute = "none"
    """Activations computed again in the backward pass instead of kept: those of attention, or of whole layers."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ModelConfig):
    """The critic starts from the policy's base model, with a fresh value head in place of the LM head."""

    value_head_init: ValueHeadInit = "normal"
    """`normal`: N(0, 1/(H + 1)), the released code; `uniform`: U(-sqrt 5, sqrt 5), the paper."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The grid of ranks; what is left of the world size after tp, pp and cp is data parallel."""

    tp: int = 1
    """Tensor-parallel size: heads, MLP columns and the vocabulary are split."""
    pp: int = 1
    """Pipeline-parallel size: layers are split into stages."""
    vpp: int = 1
    """Model chunks of each pipeline stage: more of them leave a stage idle for less time (interleaved schedule)."""
    chunk_layers: tuple[int, ...] = ()
    """Layers of each of the pp * vpp chunks, in the order of the layers; empty splits them as evenly as possible."""
    cp: int = 1
    """Context-parallel size: each sequence of a pack is split."""
    ep: int = 1
    """Expert-parallel size: the experts are split over this many of the ranks that hold the same layers."""
    sequence_parallel: bool = False
    """Split the token dimension between tensor-parallel regions over the tp ranks."""
    overlap: bool = False
    """Reduce gradients during the backward pass, and gather updated parameters during the next forward pass."""
    timeout_s: float = 600.0
    """Deadline of every collective between trainer ranks."""
    num_ranks: int | None = None
    """GPUs the recipe is laid out for, on which a dry run in a single process plans; a run takes those it gets."""

    def __post_init__(self) -> None:
        _require(
            self.num_ranks is None or self.num_ranks >= 1, f"parallel.num_ranks {self.num_ranks} is not at least 1"
        )
        for name in ("tp", "pp", "vpp", "cp", "ep"):
            _require(getattr(self, name) >= 1, f"parallel.{name} {getattr(self, name)} is not at least 1")
        _require(
            self.pp > 1 or self.vpp == 1,
            f"parallel.vpp {self.vpp} interleaves the chunks of pipeline stages: it needs parallel.pp > 1",
        )
        _require(
            not self.chunk_layers or len(self.chunk_layers) == self.pp * self.vpp,
            f"parallel.chunk_layers has {len(self.chunk_layers)} entries, but pp*vpp = {self.pp}*{self.vpp} chunks "
            "need one each",
        )
        _require(
            all(count >= 1 for count in self.chunk_layers),
            f"parallel.chunk_layers {self.chunk_layers} leaves a chunk without a layer; give every chunk at least one",
        )
        _require(
            self.tp > 1 or not self.sequence_parallel,
            "parallel.sequence_parallel splits tokens over tensor-parallel ranks: it needs parallel.tp > 1",
        )

    @property
    def pack_multiple(self) -> int:
        """The number of tokens in a pack is a multiple of this: sequence parallelism cuts it into tp equal parts."""
        return self.tp if self.sequence_parallel else 1

    def check_world_size(self, world_size: int) -> None:
        """Raises ValueError when `world_size` ranks cannot be laid out as tp x pp x cp x dp."""
        _require(
            world_size % (self.tp * self.pp * self.cp) == 0,
            f"world size {world_size} is not a multiple of tp*pp*cp = {self.tp}*{self.pp}*{self.cp}; "
            "set parallel.tp, parallel.pp or parallel.cp, or start another number of ranks (torchrun --nproc-per-node)",
        )
        _require(
            world_size // self.pp % self.ep == 0,
            f"parallel.ep {self.ep} does not divide the {world_size // self.pp} ranks of a pipeline stage "
            f"(world size {world_size} / pp {self.pp}); choose an ep that does",
        )


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
    """`gae`: by a critic. Without one, the rewards of a prompt's responses less their mean (`group_centred`), then by
    their standard deviation (`group_normalised`), or less the mean of the others (`leave_one_out`)."""
    gamma: float = 1.0
    gae_lambda: float = 1.0
    """Of the advantages; 0 is the temporal difference alone, 1 the whole return."""
    value_gae_lambda: float | None = None
    """Lambda of the returns that the critic learns, where it is another (decoupled GAE)."""
    gae_alpha: float | None = None
    """Length-adaptive GAE: the advantages of a response of n tokens have lambda 1 - 1 / (gae_alpha n)."""
    num_critic_warmup_steps: int = 0
    """First steps, in which the critic alone learns."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a step to mean 0 and variance 1 over all response tokens."""
    clip_eps: float = 0.2
    """Clip range of the probability ratio, below 1 and above."""
    clip_eps_high: float | None = None
    """Clip range above 1, where it is another (clip-higher)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in the loss."""
    overlong_tokens: int = 0
    """The last tokens of the longest response allowed, over which the reward falls by 1 (soft over-long penalty)."""
    value_clip_eps: float = 0.2
    """Clip range of the value around its old one; 0 turns value clipping off."""
    importance_cap: float = 0.0
    """A token's loss weighs min(pi_old / pi_rollout, cap), for rollouts of an older policy; 0 leaves the weight out."""
    max_staleness: int = 0
    """Policy versions rollouts may be behind: 0 waits for the servers; 1 lets them generate a step ahead meanwhile."""
    oversampling: float = 0.0
    """Share of prompts asked in addition; a step goes on without those answered last. It favours short responses."""
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
            _require(getattr(self, name) >= 1, f"ppo.{name} {getattr(self, name)} is not at least 1")
        for name in ("gamma", "gae_lambda", "value_gae_lambda"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, f"ppo.{name} {value} is outside [0, 1]")
        for name in ("clip_eps", "clip_eps_high", "gae_alpha"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"ppo.{name} {value} is not positive")
        for name in ("entropy_coefficient", "overlong_tokens", "num_critic_warmup_steps"):
            _require(getattr(self, name) >= 0, f"ppo.{name} {getattr(self, name)} is negative; 0 turns it off")
        _require(self.importance_cap >= 0, f"ppo.importance_cap {self.importance_cap} is negative; 0 turns it off")
        _require(self.max_staleness in (0, 1), f"ppo.max_staleness {self.max_staleness} is neither 0 nor 1")
        _require(self.oversampling >= 0, f"ppo.oversampling {self.oversampling} is negative; 0 turns it off")
        rounds = self.max_resampling_rounds
        _require(rounds >= 0, f"ppo.max_resampling_rounds {rounds} is negative; 0 turns resampling off")
        _require(
            rounds == 0 or self.num_responses > 1,
            f"ppo.max_resampling_rounds {rounds} compares siblings: it needs ppo.num_responses > 1",
        )
        _require(self.value_clip_eps >= 0, f"ppo.value_clip_eps {self.value_clip_eps} is negative; 0 turns it off")
        self._check_advantages()

    def _check_advantages(self) -> None:
        _require(
            self.gae_alpha is None or self.gae_lambda == 1,
            f"ppo.gae_alpha {self.gae_alpha} makes lambda depend on the length, so that ppo.gae_lambda "
            f"{self.gae_lambda} has no effect; set one of them",
        )
        _require(
            self.num_critic_warmup_steps < self.num_steps,
            f"ppo.num_critic_warmup_steps {self.num_critic_warmup_steps} leaves the policy none of the "
            f"{self.num_steps} steps; lower it, or raise ppo.num_steps",
        )
        if self.uses_critic:
            return
        _require(
            self.num_responses >= 2,
            f"ppo.advantages {self.advantages} compares the responses of a prompt, but ppo.num_responses is "
            f"{self.num_responses}; raise it to at least 2, or set ppo.advantages to gae",
        )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("gamma", "gae_lambda", "value_gae_lambda", "gae_alpha", "num_critic_warmup_steps"):
            _require(
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
    """k1: log pi - log ref; k2: half its square; k3: ref / pi - 1 + k1. Differentiated, k1 is 0 on average: no loss."""
    place: KLPlace = "loss"
    """Add it to the loss, or take it from the rewards of the tokens."""
    reference: Path | None = None
    """Hugging Face checkpoint of the reference, usually the policy's own."""
    refresh: Refresh = "never"
    """When the reference becomes the policy of that time: after every so many steps, or those of an epoch."""

    def __post_init__(self) -> None:
        _require(self.coefficient >= 0, f"kl.coefficient {self.coefficient} is negative; 0 turns the penalty off")
        _require(
            isinstance(self.refresh, str) or self.refresh >= 1,
            f"kl.refresh {self.refresh} is neither never, nor epoch, nor at least 1 step",
        )
        _require(
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
        _require(self.max_response_tokens >= 1, f"sampling.max_response_tokens {self.max_response_tokens} < 1")
        _require(self.temperature > 0, f"sampling.temperature {self.temperature} is not positive")
        _require(0 < self.top_p <= 1, f"sampling.top_p {self.top_p} is outside (0, 1]")
        _require(self.top_k == -1 or self.top_k >= 1, f"sampling.top_k {self.top_k} is neither -1 nor positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training prompts and the packs made of their rollouts."""

    train: tuple[Path, ...]
    """Prompt files: .json in the recipe's form, .jsonl or .parquet with the columns below."""
    problem_column: str = "question"
    answer_column: str = "answer"
    template: str = "orz"
    """Name of a built-in prompt template (`orz`, `short`), or a text that holds `{problem}`."""
    max_prompt_tokens: int = 2048
    """Longer prompts are dropped and counted."""
    max_pack_tokens: int = 16384
    """Token budget of a pack, which is also the micro-batch."""

    def __post_init__(self) -> None:
        _require(len(self.train) > 0, "data.train names no file; give at least one prompt file")
        _require(self.max_prompt_tokens >= 1, f"data.max_prompt_tokens {self.max_prompt_tokens} < 1")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The rule-based verifier."""

    timeout_s: float = 5.0
    """Deadline of one comparison; past it the answer counts as timed out, with reward 0."""
    num_workers: int = 2
    """Verifier processes."""

    def __post_init__(self) -> None:
        _require(self.timeout_s > 0, f"reward.timeout_s {self.timeout_s} is not positive")
        _require(self.num_workers >= 1, f"reward.num_workers {self.num_workers} < 1")


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Where rollouts are generated."""

    kind: FleetKind = "vllm"
    """`vllm`, `sglang`: inference servers; `local`: transformers, inside the trainer."""
    urls: tuple[str, ...] = ()
    """Servers that run already (http://host:port); none: the run starts and stops its own on this machine."""
    num_servers: int = 1
    """Servers to start."""
    server_tp: int = 1
    """Tensor-parallel size of each server: its GPUs, or processes on the CPU."""
    gpus: tuple[int, ...] = ()
    """GPUs of the servers that are started, server_tp for each; by default the first of those the trainer sees."""
    colocated: bool = False
    """Servers and trainer use the same GPUs in turns: servers sleep during training, the trainer is offloaded during
    generation."""
    min_servers: int = 1
    """With fewer servers than this able to answer, the run stops."""
    port: int = 0
    """The first server's port on 127.0.0.1, the next ones follow; 0 picks free ones."""
    max_model_tokens: int = 8192
    """Longest prompt plus response a server accepts."""
    max_rollouts_in_flight: int = 2048
    """Rollouts asked of a server at a time: enough to fill its batch, as more would only wait in its queue."""
    kv_cache_gib: float = 1.0
    """Memory of a server's key-value cache on the CPU."""
    cpu_threads: int | None = None
    """Threads of a server on the CPU; all cores by default. One is best for tiny models: more wait for each other."""
    gpu_memory_share: float = 0.7
    """Share of each GPU's memory a colocated server may use."""
    start_timeout_s: float = 300.0
    """Deadline for a server to answer its health check after it is started."""
    request_timeout_s: float = 600.0
    """Deadline of one generation request, after which another server is asked."""
    heartbeat_timeout_s: float = 60.0
    """A server that does not answer the watch for this long is started anew."""
    stuck_timeout_s: float = 300.0
    """A server that has requests but computes no token for this long is started anew."""
    update_timeout_s: float = 300.0
    """Deadline of one weight update."""
    dtype: DType | None = None
    """Type of the weights in servers that are started; by default the policy's."""
    transport: TransportKind = "auto"
    """How weights reach the servers: `ipc` (shared memory, one machine), `nccl`, `gloo`, or `disk` (a folder all see);
    `auto` is ipc where the run starts the servers, else nccl between GPUs and gloo between CPUs."""
    verification: Verification = "sampled"
    """What of each weight update is read back from the servers and compared: `sampled` is all tensors at first, then
    every sixteenth in turn; `full` is always all."""
    max_batch_rollouts: int = 512
    """Rollouts decoded together by the `local` fleet."""

    def __post_init__(self) -> None:
        for name in (
            *("start_timeout_s", "request_timeout_s", "heartbeat_timeout_s", "stuck_timeout_s", "update_timeout_s"),
            "kv_cache_gib",
        ):
            _require(getattr(self, name) > 0, f"fleet.{name} {getattr(self, name)} is not positive")
        for name in (
            *("max_model_tokens", "max_batch_rollouts"),
            *("num_servers", "server_tp", "min_servers", "max_rollouts_in_flight"),
        ):
            _require(getattr(self, name) >= 1, f"fleet.{name} {getattr(self, name)} is not at least 1")
        _require(0 <= self.port <= 65535, f"fleet.port {self.port} is no port; 0 picks a free one")
        _require(self.cpu_threads is None or self.cpu_threads >= 1, f"fleet.cpu_threads {self.cpu_threads} < 1")
        _require(0 < self.gpu_memory_share < 1, f"fleet.gpu_memory_share {self.gpu_memory_share} is outside (0, 1)")
        _require(
            not self.urls or self.num_servers == 1,
            f"fleet.urls names the servers, so that fleet.num_servers {self.num_servers} would start others; "
            "give one of them",
        )
        for url in self.urls:
            _require(
                url.startswith(("http://", "https://")),
                f"fleet.urls holds {url!r}, which is no http:// or https:// address",
            )
        _require(
            not (self.colocated and self.urls),
            "fleet.colocated needs servers that the run starts on its own GPUs; leave fleet.urls empty",
        )
        _require(
            not (self.colocated and self.kind == "local"),
            "fleet.colocated is about servers, and fleet.kind is local; set it to false",
        )
        _require(len(set(self.urls)) == len(self.urls), f"fleet.urls {self.urls} names a server twice")
        num_servers = len(self.urls) or self.num_servers
        _require(
            self.min_servers <= num_servers,
            f"fleet.min_servers {self.min_servers} exceeds the {num_servers} servers of the fleet; lower it",
        )
        _require(
            not self.gpus or len(self.gpus) == self.num_servers * self.server_tp,
            f"fleet.gpus names {len(self.gpus)} GPUs, but {self.num_servers} servers of {self.server_tp} GPUs need "
            f"{self.num_servers * self.server_tp}",
        )

    def server_gpus(self, index: int, *, num_gpus: int) -> tuple[int, ...]:
        """The GPUs of the `index`-th server, of the `num_gpus` the trainer sees. Raises ValueError if it lacks them."""
        gpus = self.gpus or tuple(range(self.num_servers * self.server_tp))
        _require(
            max(gpus) < num_gpus,
            f"{self.num_servers} servers of {self.server_tp} GPUs use GPU {max(gpus)}, but only {num_gpus} are "
            "visible; lower fleet.num_servers or fleet.server_tp, or set fleet.gpus",
        )
        return gpus[index * self.server_tp : (index + 1) * self.server_tp]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out prompts, answered and graded like the training prompts."""

    data: tuple[Path, ...] = ()
    """Prompt files; none turns evaluation off."""
    interval: int = 10
    """Evaluate before the first step, after every `interval` steps, and after the last one."""
    num_responses: int = 4
    """Responses per prompt: the score is avg@k for this k."""
    max_prompts: int | None = None
    """Use only the first prompts of each file."""

    def __post_init__(self) -> None:
        _require(self.interval >= 1, f"evaluation.interval {self.interval} < 1")
        _require(self.num_responses >= 1, f"evaluation.num_responses {self.num_responses} < 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run that is interrupted goes on from: `docs/reliability.md`."""

    interval: int = 10
    """Save the training state after every `interval` steps, and after the last one; 0 saves none."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those of every `keep_every`-th step; 0 keeps none of them."""
    asynchronous: bool = True
    """Write beside the next step, from a copy in host memory of what the rank holds; else training waits."""
    export_interval: int = 0
    """Export the policy to `exports/`, in the Hugging Face form, after every so many steps; 0 exports only the last."""
    grace_s: float = 60.0
    """After SIGTERM or SIGUSR1, how long the step may take to end before the run stops without a checkpoint of it."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_every", "export_interval"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name} {getattr(self, name)} is negative; 0 turns it off")
        _require(self.keep >= 1, f"checkpoint.keep {self.keep} < 1; set checkpoint.interval 0 to save none")
        _require(self.grace_s > 0, f"checkpoint.grace_s {self.grace_s} is not positive")
        _require(
            self.keep_every == 0 or (self.interval > 0 and self.keep_every % self.interval == 0),
            f"checkpoint.keep_every {self.keep_every} is not a multiple of checkpoint.interval {self.interval}, "
            "so that no checkpoint would be kept; make it one",
        )


@dataclass(frozen=True, kw_only=True)
class GenerationsConfig:
    """The rollouts of a step as a parquet file, for people and for analysis."""

    interval: int = 1
    """Save those of every `interval`-th step; 0 saves none."""
    max_mib: float = 64.0
    """Largest file. What a step has beyond it is left out, from the last prompt on, and counted."""

    def __post_init__(self) -> None:
        _require(self.interval >= 0, f"generations.interval {self.interval} is negative; 0 saves none")
        _require(
            self.interval == 0 or self.max_mib > 0,
            f"generations.max_mib {self.max_mib} holds no rollout; set generations.interval to 0 to save none",
        )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Experiment trackers that get the metrics beside metrics.jsonl and TensorBoard, which every run writes."""

    trackers: tuple[Tracker, ...] = ()
    """Each is a package that has to be installed, such as by `pip install megatron_orz[wandb]`."""
    project: str = "megatron_orz"
    """Where the trackers file the run, under the name of its directory."""

    def __post_init__(self) -> None:
        _require(len(set(self.trackers)) == len(self.trackers), f"tracking.trackers {self.trackers} names one twice")
        _require(self.project != "", "tracking.project is empty; name a project")


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
    """Begin anew: what run_dir holds is set aside, where the run would else go on from its last checkpoint."""
    dry_run: bool = False
    """Check everything that can be checked without building a model, print the resolved config and a plan, and stop."""
    debug: bool = False
    """Scale the recipe down to one machine: few prompts, short responses, one update. Other options still count."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _require(
            not self.deterministic or self.fleet.kind == "local",
            f"deterministic needs fleet.kind local, not {self.fleet.kind}: what a server computes together depends on "
            "when requests arrive; set fleet.kind, or turn deterministic off",
        )
        longest = self.data.max_prompt_tokens + self.sampling.max_response_tokens
        _require(
            longest <= self.fleet.max_model_tokens,
            f"a prompt of {self.data.max_prompt_tokens} tokens and a response of {self.sampling.max_response_tokens} "
            f"exceed fleet.max_model_tokens {self.fleet.max_model_tokens}; raise it, or lower "
            "data.max_prompt_tokens or sampling.max_response_tokens",
        )
        if self.ppo.max_staleness:
            _require(
                self.fleet.kind != "local" and not self.fleet.colocated,
                f"ppo.max_staleness {self.ppo.max_staleness} needs servers that compute beside the trainer; set it to "
                "0, or fleet.kind to vllm and fleet.colocated to false",
            )
            _require(
                not self.ppo.oversampling and not self.ppo.max_resampling_rounds,
                f"ppo.max_staleness {self.ppo.max_staleness} asks for prompts a step ahead, which ppo.oversampling and "
                "ppo.max_resampling_rounds would change; set either to 0",
            )
        _require(
            self.fleet.kind != "local" or self.ppo.oversampling == 0,
            f"ppo.oversampling {self.ppo.oversampling} needs servers, which answer prompts apart; "
            "set it to 0, or use --fleet.kind vllm",
        )
        _require(
            self.fleet.kind != "sglang" or (self.sampling.top_p == 1.0 and self.sampling.top_k == -1),
            f"SGLang's log-probabilities leave out sampling.top_p {self.sampling.top_p} and sampling.top_k "
            f"{self.sampling.top_k}: they would not be those of the responses; use 1.0 and -1, or --fleet.kind vllm",
        )
        multiple = self.parallel.pack_multiple
        least = -(-longest // multiple) * multiple
        _require(
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
            _require(
                self.hang_timeout_s > deadline_s,
                f"hang_timeout_s {self.hang_timeout_s:g} is not above {name} {deadline_s:g}, whose end says more of "
                "what hangs; raise hang_timeout_s",
            )
        num_rollouts = self.ppo.num_prompts * self.ppo.num_responses
        num_updates = max(self.ppo.num_updates(step=self.ppo.num_steps))
        _require(
            num_rollouts >= num_updates,
            f"{num_rollouts} rollouts a step cannot be split into {num_updates} mini-batches; "
            "raise ppo.num_prompts or lower ppo.num_critic_updates",
        )
        _require(
            self.critic is not None or not self.ppo.uses_critic,
            "ppo.advantages gae needs the values of a critic, but critic is None; set critic to a CriticConfig, or "
            "ppo.advantages to group_normalised",
        )
        _require(
            self.ppo.overlong_tokens < self.sampling.max_response_tokens,
            f"ppo.overlong_tokens {self.ppo.overlong_tokens} leaves nothing of sampling.max_response_tokens "
            f"{self.sampling.max_response_tokens} without a penalty; lower it",
        )


def to_json(config: Any) -> str:
    """A config dataclass as indented JSON, paths as text."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
