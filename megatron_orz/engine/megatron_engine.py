"""Policy and critic as the PPO loop sees them: `infer` and `step` over megatron-core's pipeline schedule.

Micro-batches, the schedule, the weights that turn a sum of token losses into a mean, clipping and the optimizer
exist only here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_orz.algorithms.losses import loss_totals, token_weights
from megatron_orz.config import CriticConfig, ModelConfig
from megatron_orz.engine import platform, weights
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.micro_batches import MicroBatch, micro_batches
from megatron_orz.engine.model import HeadlessGPTModel, ValueHead, build_model
from megatron_orz.engine.optimizer import Optimizer
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.replicas import finish_gather, gather_parameters, replicate
from megatron_orz.ops.log_prob import linear_log_prob
from megatron_orz.types import LossMean, LossOutput, Metrics, NamedWeights, PackedBatch, PolicyOutput

Output = TypeVar("Output", PolicyOutput, Tensor)
Batch = TypeVar("Batch", bound=PackedBatch)


class MegatronEngine(ABC, Generic[Output]):
    """A sharded model with its optimizer. Every call is collective over the whole mesh.

    Subclasses say what the head makes of the last stage's hidden states.
    """

    name: str

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        loss_mean: LossMean = "token",
        value_head: ValueHead | None = None,
    ) -> None:
        self.mesh = mesh
        self.architecture: Architecture = read_architecture(config.path)
        self.architecture.check_layout(mesh.config)
        self.loss_mean: LossMean = loss_mean
        self._has_value_head = value_head is not None
        with platform.megatron_calls():
            self.chunks = build_model(
                self.architecture, mesh, dtype=config.dtype, recompute=config.recompute, value_head=value_head
            )
            weights.load(self.chunks, config.path, self.architecture, mesh, value_head=self._has_value_head)
            self._replicas = replicate(self.chunks, mesh.config, config.optimizer)
            self._optimizer = Optimizer(self._replicas, config.optimizer, self.name)

    @property
    def model(self) -> HeadlessGPTModel:
        """This rank's chunk nearest the output: on the last stage it holds the head."""
        return self.chunks[-1]

    @abstractmethod
    def _head(self, hidden: Tensor, batch: PackedBatch) -> Output:
        """hidden: [T, H], equal on every tensor-parallel rank."""

    @abstractmethod
    def _inferred(self, output: Output) -> Tensor:
        """The part of the head's output that `infer` returns, [T] float32."""

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """A [T] float32 tensor for each batch, on the CPU of every rank."""

        def collect(output: Output, pack: MicroBatch[PackedBatch]) -> tuple[Tensor, Tensor]:
            inferred = self._inferred(output)
            return inferred.new_zeros(()), pack.whole(inferred)

        gather_parameters(self._replicas)
        for replica in self._replicas:
            replica.eval()
        with torch.no_grad():
            results = self._run(batches, collect, forward_only=True)
        sizes = [batch.tokens.shape[0] for batch in batches]
        flat = torch.cat(results) if self.mesh.is_last_stage else torch.empty(sum(sizes), device=self.mesh.device)
        return list(self.mesh.broadcast_from_last_stage(flat).cpu().split(sizes))

    def step(self, minibatch: Sequence[Batch], loss: Callable[[Output, Batch], LossOutput]) -> Metrics:
        """One optimizer step on this rank's share of a mini-batch. Returns means over its loss tokens.

        Raises RuntimeError when gradients stay non-finite.
        """
        totals = loss_totals(minibatch)
        dist.all_reduce(totals, group=self.mesh.dp_group)

        def weighted(output: Output, pack: MicroBatch[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
            result = loss(output, pack.local)
            total = (result.per_token * pack.take(token_weights(pack.batch, self.loss_mean, totals))).sum()
            mean_weights = pack.take(token_weights(pack.batch, "token", totals))
            metrics = {name: (value.detach() * mean_weights).sum() for name, value in result.metrics.items()}
            return total, {f"{self.name}/loss": total.detach().clone(), **metrics}

        for replica in self._replicas:
            replica.train()
        self._optimizer.zero_grad()
        results = self._run(minibatch, weighted, forward_only=False)
        with platform.megatron_calls():
            update = self._optimizer.step()
        return self._sum_metrics(results) | {f"{self.name}/{name}": value for name, value in update.items()}

    def hf_weights(self) -> NamedWeights:
        """The whole weights under their Hugging Face names; every rank must exhaust the iterator."""
        gather_parameters(self._replicas)
        return weights.hf_weights(self.chunks, self.architecture, self.mesh, value_head=self._has_value_head)

    def _run(
        self,
        batches: Sequence[Batch],
        on_output: Callable[[Output, MicroBatch[Batch]], tuple[Tensor, Any]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Runs the pipeline schedule over the batches; the second results of `on_output`, on the last stage."""
        packs = micro_batches(batches, self.mesh, dtype=self.model.config.params_dtype)

        def loss_func(pack: MicroBatch[Batch], hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            finish_gather(self._replicas[-1])
            loss, result = on_output(self._head(self._whole(hidden), pack.local), pack)
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), result

        def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            pack = next(iterator)
            hidden = model(
                input_ids=pack.local.tokens[None],
                position_ids=pack.local.position_ids[None],
                attention_mask=None,
                packed_seq_params=pack.layout,
            )
            return hidden, partial(loss_func, pack)

        with platform.megatron_calls():
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(packs) for _ in self._replicas],
                model=self._replicas,
                num_microbatches=len(packs),
                seq_length=packs[0].local.tokens.shape[0],
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return list(results[: len(batches)])

    def _whole(self, hidden: Tensor) -> Tensor:
        """The last stage's output [T or T/tp, 1, H] as [T, H] on every tensor-parallel rank.

        All ranks compute the same head from it, so its gradient is cut, not summed, on the way back.
        """
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def _sum_metrics(self, results: list[dict[str, Tensor]]) -> Metrics:
        """Sums over micro-batches, data- and context-parallel ranks, known on every rank."""
        names: list[Any] = [sorted(results[0])] if self.mesh.is_last_stage else [None]
        if self.mesh.pp > 1:
            dist.broadcast_object_list(names, group=self.mesh.pp_group, group_src=self.mesh.pp - 1)
        sums = torch.zeros(len(names[0]), device=self.mesh.device)
        for result in results if self.mesh.is_last_stage else []:
            sums += torch.stack([result[name] for name in names[0]])
        dist.all_reduce(sums, group=self.mesh.dp_cp_group)
        self.mesh.broadcast_from_last_stage(sums)
        return dict(zip(names[0], sums.tolist(), strict=True))


class PolicyEngine(MegatronEngine[PolicyOutput]):
    """The policy: log-probabilities and entropy from the deferred language-model head."""

    name = "policy"

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, loss_mean: LossMean = "token", temperature: float = 1.0
    ) -> None:
        self._temperature = temperature
        super().__init__(config, mesh, loss_mean=loss_mean)

    def _head(self, hidden: Tensor, batch: PackedBatch) -> PolicyOutput:
        if self.architecture.tied_embeddings:
            weight = self.model.shared_embedding_or_output_weight()
        else:
            weight = self.model.output_layer.weight
        log_probs, entropy = linear_log_prob(
            hidden,
            weight,
            batch.targets,
            loss_mask=batch.loss_mask,
            temperature=self._temperature,
            vocab_size=self.architecture.vocab_size,
            tp_group=self.mesh.tp_group,
        )
        return PolicyOutput(log_probs=log_probs, entropy=entropy)

    def _inferred(self, output: PolicyOutput) -> Tensor:
        return output.log_probs


class CriticEngine(MegatronEngine[Tensor]):
    """The critic: values from a linear head on the base model."""

    name = "critic"

    def __init__(self, config: CriticConfig, mesh: Mesh, *, loss_mean: LossMean = "token", seed: int = 0) -> None:
        architecture = read_architecture(config.path)
        head = ValueHead(architecture.hidden_size, init=config.value_head_init, seed=seed)
        super().__init__(config, mesh, loss_mean=loss_mean, value_head=head)

    def _head(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.model.output_layer(hidden)

    def _inferred(self, output: Tensor) -> Tensor:
        return output
