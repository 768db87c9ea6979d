"""One layout of the parity suite: what its ranks do, and how their results are held against the reference.

Everything that turns shards into whole tensors here is written apart from `engine.weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_orz.algorithms.losses import ClippedValueLoss
from megatron_orz.config import CriticConfig, DType, ModelConfig, OptimizerConfig, ParallelConfig, Recompute
from megatron_orz.types import Experience, LossMean, LossOutput, NamedWeights, PolicyOutput
from tests.engine import tiny

NUM_SEQUENCES = 12
NUM_STEPS = 3
TEMPERATURE = 0.7
CLIP_EPS = 0.2
GAMMA, GAE_LAMBDA = 0.9, 0.8
VALUE_HEAD_SEED = 11
# At AdamW's usual eps of 1e-8 an update near a zero gradient is its sign: noise.
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=2, eps=1e-4, weight_decay=0.1, clip_grad=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one case spreads the same work."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    chunk_layers: tuple[int, ...] = ()
    cp: int = 1
    ep: int = 1
    dp: int = 1
    sp: bool = False
    overlap: bool = False
    num_packs: int = 3
    recompute: Recompute = "none"
    distributed: bool = True
    family: str = "qwen2"
    tied: bool = False
    loss_mean: LossMean = "token"
    dtype: DType = "float32"

    def __str__(self) -> str:
        changed = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        return "-".join(f"{name}{value}".replace(" ", "") for name, value in changed.items()) or "single"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            vpp=self.vpp,
            chunk_layers=self.chunk_layers,
            cp=self.cp,
            ep=self.ep,
            sequence_parallel=self.sp,
            overlap=self.overlap,
            timeout_s=300,
        )

    @property
    def model(self) -> tuple[str, bool, DType]:
        return self.family, self.tied, self.dtype


def policy_loss(output: PolicyOutput, experience: Experience) -> LossOutput:
    """The clipped surrogate with an entropy bonus; the probe weighs every token's entropy differently."""
    ratio = (output.log_probs - experience.old_log_probs).exp()
    clipped = ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS)
    surrogate = torch.minimum(ratio * experience.advantages, clipped * experience.advantages)
    return LossOutput(
        per_token=-surrogate - 0.01 * output.entropy,
        metrics={"policy/entropy": output.entropy, "policy/entropy_probe": output.entropy * experience.returns},
    )


def value_loss(values: Tensor, experience: Experience) -> LossOutput:
    """The formula of `ClippedValueLoss`, which the engine fuses with the value head."""
    lowest, highest = experience.old_values - CLIP_EPS, experience.old_values + CLIP_EPS
    error = (values - experience.returns) ** 2
    clipped_error = (torch.maximum(torch.minimum(values, highest), lowest) - experience.returns) ** 2
    return LossOutput(
        per_token=0.5 * torch.maximum(error, clipped_error),
        metrics={"critic/value": values, "critic/clip_share": (clipped_error > error).float()},
    )


def packs_of_rank(sequences: list[Experience], layout: Layout, dp_rank: int) -> list[Experience]:
    """The sequences dealt over dp x num_packs packs, and an empty pack where there are several ranks."""
    multiple = layout.tp if layout.sp else 1
    mine = sequences[dp_rank :: layout.dp]
    packs = [tiny.concatenate(mine[i :: layout.num_packs], multiple=multiple) for i in range(layout.num_packs)]
    return packs + [tiny.empty_pack(2 * multiple)] * (layout.dp > 1)


def order_on_rank_0(layout: Layout) -> list[int]:
    """The sequences of the first data-parallel rank, as its packs hold them one after another."""
    mine = list(range(0, NUM_SEQUENCES, layout.dp))
    return [sequence for i in range(layout.num_packs) for sequence in mine[i :: layout.num_packs]]


def run_layout(layout: Layout, path: Path, output: Path, plant: Callable[[], Any] | None = None) -> None:
    """What one rank does: inference, advantages, updates, inference and export; rank 0 writes the results.

    plant: breaks something in this process, and returns how to mend it.
    """
    from megatron_orz.algorithms.advantages import estimate
    from megatron_orz.algorithms.gae import gae
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    sequences = tiny.random_sequences(NUM_SEQUENCES)
    optimizer = dataclasses.replace(OPTIMIZER, distributed=layout.distributed)
    mend = plant() if plant else lambda: None
    try:
        with open_mesh(layout.parallel, seed=0) as mesh:
            packs = packs_of_rank(sequences, layout, mesh.dp_rank)
            common: dict[str, Any] = {
                "path": path,
                "optimizer": optimizer,
                "recompute": layout.recompute,
                "dtype": layout.dtype,
            }
            policy = PolicyEngine(ModelConfig(**common), mesh, loss_mean=layout.loss_mean, temperature=TEMPERATURE)
            critic = CriticEngine(CriticConfig(**common), mesh, loss_mean=layout.loss_mean, seed=VALUE_HEAD_SEED)
            results: dict[str, Any] = {"weights_before": copy_of(policy.hf_weights())}
            results["log_probs"], results["values"] = policy.infer(packs), critic.infer(packs)
            rewards = [dataclasses.replace(pack, rewards=pack.returns) for pack in packs]
            estimates, _ = estimate(
                rewards,
                results["log_probs"],
                results["values"],
                results["log_probs"],
                estimator=partial(gae, gamma=GAMMA, gae_lambda=GAE_LAMBDA),
            )
            results["advantages"] = [pack.advantages for pack in estimates]
            for engine, loss in ((policy, policy_loss), (critic, ClippedValueLoss(CLIP_EPS))):
                gradients = keep_first_gradients(engine)
                results[f"{engine.name}_metrics"] = [engine.step(packs, loss) for _ in range(NUM_STEPS)]
                results[f"{engine.name}_gradients"] = gradients
            results["weights_after"] = copy_of(policy.hf_weights())
            results["log_probs_after"], results["values_after"] = policy.infer(packs), critic.infer(packs)
            for engine in (policy, critic):
                results[f"{engine.name}_after"] = whole_tensors(engine, lambda parameter: parameter.detach())
            if mesh.rank == 0:
                torch.save(results, output)
    finally:
        mend()


def copy_of(weights: NamedWeights) -> dict[str, Tensor]:
    return {name: weight.cpu().float().clone() for name, weight in weights}


def keep_first_gradients(engine: Any) -> dict[str, Tensor]:
    """Filled with the whole gradients of the engine's next update, before they are clipped."""
    gradients: dict[str, Tensor] = {}
    apply = engine._optimizer.step

    def keep_then_apply() -> dict[str, float]:
        if not gradients:
            for replica in engine._replicas:
                for group in replica.bucket_groups + replica.expert_parallel_bucket_groups:
                    _complete_gradients(group)
            gradients.update(whole_tensors(engine, lambda parameter: parameter.main_grad))
        return apply()

    engine._optimizer.step = keep_then_apply
    return gradients


def _complete_gradients(group: Any) -> None:
    """The distributed optimizer leaves each rank the sum of a part; brings the parts together."""
    if not group.ddp_config.use_distributed_optimizer:
        return
    ranks = group.intra_distributed_optimizer_instance_group
    for bucket in group.buckets:
        parts = list(bucket.grad_data.chunk(ranks.size()))
        gathered = [torch.empty_like(part) for part in parts]
        dist.all_gather(gathered, parts[ranks.rank()].contiguous(), group=ranks)
        bucket.grad_data.copy_(torch.cat(gathered))


def whole_tensors(engine: Any, pick: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """What `pick` finds on the parameters of all ranks, joined, under the names of an undivided model.

    Ranks that hold the same parameter must agree to the last bit: where they do not, the result is infinite.
    """
    from megatron_orz.engine.weights import global_parameters

    mesh = engine.mesh
    mine = {}
    for name, parameter in global_parameters(engine.chunks).items():
        value = pick(parameter).clone()
        is_cut = getattr(parameter, "tensor_model_parallel", False) and "local_experts" not in name
        if mesh.tp > 1 and is_cut:
            shards = [torch.empty_like(value) for _ in range(mesh.tp)]
            dist.all_gather(shards, value.contiguous(), group=mesh.tp_group)
            if "linear_fc1" in name:
                halves = [shard.chunk(2) for shard in shards]
                value = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
            else:
                value = torch.cat(shards, dim=parameter.partition_dim)
        mine[name] = value.cpu().float()
    ranks: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(ranks, mine)
    merged: dict[str, Tensor] = {}
    for tensors in ranks:
        for name, value in tensors.items():
            if not torch.equal(merged.setdefault(name, value), value):
                merged[name] = torch.full_like(value, torch.inf)
    return merged
