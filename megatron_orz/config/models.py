"""The models, their optimizers, and the grid of ranks they are spread over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from megatron_orz.config.checks import require

DType: TypeAlias = Literal["float32", "bfloat16"]
Recompute: TypeAlias = Literal["none", "selective", "full"]
ValueHeadInit: TypeAlias = Literal["normal", "uniform"]
LRDecay: TypeAlias = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant rate or one that falls."""

    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0 to `lr`."""
    decay: LRDecay = "constant"
    """After the warm-up the rate stays, or falls to `min_lr` along a line or half a cosine."""
    decay_steps: int | None = None
    """The optimizer step at which the rate reaches `min_lr`, where it stays; a supervised run takes its last."""
    min_lr: float = 0.0
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
        require(self.lr > 0, f"lr {self.lr} is not positive")
        require(self.warmup_steps >= 0, f"warmup_steps {self.warmup_steps} is negative; 0 means none")
        require(
            self.decay != "constant" or (self.decay_steps is None and self.min_lr == 0),
            f"decay constant never reaches min_lr {self.min_lr:g} at decay_steps {self.decay_steps}; set decay to "
            "linear or cosine, or leave them out",
        )
        require(
            self.decay_steps is None or self.decay_steps > self.warmup_steps,
            f"decay_steps {self.decay_steps} is not above warmup_steps {self.warmup_steps}, where the decay begins; "
            "raise it",
        )
        require(0 <= self.min_lr <= self.lr, f"min_lr {self.min_lr:g} is outside [0, lr], and lr is {self.lr:g}")
        require(self.clip_grad >= 0, f"clip_grad {self.clip_grad} is negative; 0 turns clipping off")
        require(self.weight_decay >= 0, f"weight_decay {self.weight_decay} is negative; 0 turns it off")
        require(self.eps > 0, f"eps {self.eps} is not positive")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"{name} {beta} is outside [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Megatron model: where its weights come from, and how it is trained."""

    path: Path
    """Hugging Face checkpoint directory (config.json, safetensors, tokenizer); a critic's may be a Megatron one."""
    optimizer: OptimizerConfig
    dtype: DType = "float32"
    """Type of the weights in the forward pass; the optimizer keeps float32 copies of bfloat16 weights."""
    recompute: Recompute = "none"
    """Recompute activations in the backward pass instead of keeping them: those of attention, or of whole layers."""


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
        require(self.num_ranks is None or self.num_ranks >= 1, f"parallel.num_ranks {self.num_ranks} is not at least 1")
        for name in ("tp", "pp", "vpp", "cp", "ep"):
            require(getattr(self, name) >= 1, f"parallel.{name} {getattr(self, name)} is not at least 1")
        require(
            self.pp > 1 or self.vpp == 1,
            f"parallel.vpp {self.vpp} interleaves the chunks of pipeline stages: it needs parallel.pp > 1",
        )
        require(
            not self.chunk_layers or len(self.chunk_layers) == self.pp * self.vpp,
            f"parallel.chunk_layers has {len(self.chunk_layers)} entries, but pp*vpp = {self.pp}*{self.vpp} chunks "
            "need one each; give as many, or none",
        )
        require(
            all(count >= 1 for count in self.chunk_layers),
            f"parallel.chunk_layers {self.chunk_layers} leaves a chunk without a layer; give every chunk at least one",
        )
        require(
            self.tp > 1 or not self.sequence_parallel,
            "parallel.sequence_parallel splits tokens over tensor-parallel ranks: it needs parallel.tp > 1",
        )

    @property
    def pack_multiple(self) -> int:
        """The number of tokens in a pack is a multiple of this: sequence parallelism cuts it into tp equal parts."""
        return self.tp if self.sequence_parallel else 1

    def check_world_size(self, world_size: int) -> None:
        """Raises ValueError when `world_size` ranks cannot be laid out as tp x pp x cp x dp."""
        require(
            world_size % (self.tp * self.pp * self.cp) == 0,
            f"world size {world_size} is not a multiple of tp*pp*cp = {self.tp}*{self.pp}*{self.cp}; "
            "set parallel.tp, parallel.pp or parallel.cp, or start another number of ranks (torchrun --nproc-per-node)",
        )
        require(
            world_size // self.pp % self.ep == 0,
            f"parallel.ep {self.ep} does not divide the {world_size // self.pp} ranks of a pipeline stage "
            f"(world size {world_size} / pp {self.pp}); choose an ep that does",
        )
