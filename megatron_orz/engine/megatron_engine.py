"""Policy and critic as the PPO loop sees them: `infer` and `step` over megatron-core's pipeline schedule.

Micro-batches, the schedule, the weights that turn a sum of token losses into a mean, clipping and the optimizer
exist only here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_orz.algorithms.losses import ClippedValueLoss, loss_totals, on_policy, token_weights
from megatron_orz.config import CriticConfig, ModelConfig
from megatron_orz.engine import platform, training_state, weights
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.micro_batches import MicroBatch, micro_batches, with_fillers
from megatron_orz.engine.model import HeadlessGPTModel, ValueHead, build_model
from megatron_orz.engine.offload import Offload
from megatron_orz.engine.optimizer import Optimizer
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.replicas import finish_gather, gather_parameters, gradient_buffers, replicate
from megatron_orz.ops.log_prob import linear_log_prob
from megatron_orz.ops.token_loss import linear_token_loss
from megatron_orz.ops.value_loss import linear_value_loss
from megatron_orz.types import (
    Experience,
    LossMean,
    LossOutput,
    Metrics,
    PackedBatch,
    PolicyLoss,
    PolicyOutput,
    RepeatableWeights,
)

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
        max_response_tokens: int = 0,
        value_head: ValueHead | None = None,
        is_frozen: bool = False,
    ) -> None:
        """max_response_tokens: what the loss mean `constant` divides by. is_frozen: only `infer` will be called."""
        self.mesh = mesh
        self.architecture: Architecture = read_architecture(config.path)
        self.architecture.check_layout(mesh.config)
        self.loss_mean: LossMean = loss_mean
        self._max_response_tokens = max_response_tokens
        self._has_value_head = value_head is not None
        with platform.megatron_calls():
            self.chunks = build_model(
                self.architecture, mesh, dtype=config.dtype, recompute=config.recompute, value_head=value_head
            )
            weights.load(self.chunks, config.path, self.architecture, mesh, value_head=self._has_value_head)
            self._replicas = [] if is_frozen else replicate(self.chunks, mesh, config.optimizer)
            self._optimizer = None if is_frozen else Optimizer(self._replicas, config.optimizer, self.name)
        self._offload = Offload(mesh.device)

    @property
    def model(self) -> HeadlessGPTModel:
        """This rank's chunk nearest the output: on the last stage it holds the head."""
        return self.chunks[-1]

    @abstractmethod
    def _infer_tokens(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """What `infer` returns of a pack, [T] float32. hidden: [T, H], equal on every tensor-parallel rank."""

    @abstractmethod
    def _weighted_loss(
        self, hidden: Tensor, batch: Batch, loss: Callable[[Output, Batch], LossOutput], weights: Tensor
    ) -> tuple[Tensor, Output]:
        """sum_t weights_t * loss_t, differentiable, and the loss tokens' outputs, detached.

        hidden: [T, H], equal on every tensor-parallel rank; weights: [T] float32, 0 outside the loss mask. The gradient
        of the head may be in its `main_grad` already: what is returned must be backpropagated as it is.
        """

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """A [T] float32 tensor for each batch, on the CPU of every rank."""

        def collect(hidden: Tensor, pack: MicroBatch[PackedBatch]) -> tuple[Tensor, Tensor]:
            inferred = self._infer_tokens(hidden, pack.local)
            return inferred.new_zeros(()), pack.whole(inferred)

        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            results = self._run(batches, collect, forward_only=True)
        return self._from_last_stage(results, batches)

    def step(self, minibatch: Sequence[Batch], loss: Callable[[Output, Batch], LossOutput]) -> Metrics:
        """One optimizer step on this rank's share of a mini-batch. Returns means over its loss tokens.

        Raises RuntimeError when gradients stay non-finite.
        """
        metrics, _ = self._update(minibatch, loss)
        return metrics

    def _update(
        self,
        minibatch: Sequence[Batch],
        loss: Callable[[Output, Batch], LossOutput],
        keep: Callable[[Output], Tensor] | None = None,
    ) -> tuple[Metrics, list[Tensor]]:
        """`step`, and what `keep` takes from the outputs of its forward pass, [n] of n loss tokens.

        What is kept is returned as `infer` returns it: [T] float32 on the CPU, 0 outside the mask.
        """
        totals = loss_totals(minibatch)
        dist.all_reduce(totals, group=self.mesh.dp_group)

        def weighted(hidden: Tensor, pack: MicroBatch[Batch]) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor | None]]:
            batch = pack.local
            weights = pack.take(
                token_weights(pack.batch, self.loss_mean, totals, max_response_tokens=self._max_response_tokens)
            )
            total, output = self._weighted_loss(hidden, batch, loss, weights)
            index = batch.loss_mask.nonzero().squeeze(1)
            with torch.no_grad():
                metrics = loss(output, batch.select(index)).metrics
            mean_weights = pack.take(token_weights(pack.batch, "token", totals))[index]
            means = {name: (value * mean_weights).sum() for name, value in metrics.items()}
            kept = None
            if keep is not None:
                kept = pack.whole(torch.zeros_like(weights).index_copy(0, index, keep(output).to(weights.dtype)))
            return total, ({f"{self.name}/loss": total.detach().clone(), **means}, kept)

        self._check_loaded()
        assert self._optimizer is not None, f"the {self.name} is frozen"
        for replica in self._replicas:
            replica.train()
        self._optimizer.zero_grad()
        results = self._run(minibatch, weighted, forward_only=False)
        with platform.megatron_calls():
            update = self._optimizer.step()
        metrics = self._sum_metrics([means for means, _ in results])
        metrics |= {f"{self.name}/{name}": value for name, value in update.items()}
        return metrics, [] if keep is None else self._from_last_stage([kept for _, kept in results], minibatch)

    def hf_weights(self) -> RepeatableWeights:
        """The whole weights under their Hugging Face names; every rank must exhaust the iterator."""
        self.finish_update()
        gather = partial(weights.hf_weights, self.chunks, self.architecture, self.mesh, value_head=self._has_value_head)
        return RepeatableWeights(
            gather, gather_first=partial(gather, reach="first"), gather_stage=partial(gather, reach="own")
        )

    def finish_update(self) -> None:
        """Brings parameters that are still on their way from other ranks to this one. Collective."""
        self._check_loaded()
        gather_parameters(self._replicas)

    def save_state(self, directory: Path, *, copy: bool) -> training_state.PendingSave:
        """Fixes weights, optimizer and schedule as they are, to be written into an empty directory all ranks see.

        copy: in host memory of its own; else nothing may change before all is written.
        """
        self.finish_update()
        with platform.megatron_calls():
            state = training_state.sharded_state(self.chunks, self._optimizer)
            return training_state.save(state, directory, copy=copy)

    def load_state(self, directory: Path) -> None:
        """Goes on where the engine that saved this stopped, in whatever layout that was."""
        self._check_loaded()
        with platform.megatron_calls():
            training_state.load(self.chunks, self._optimizer, directory)

    def resident_bytes(self) -> dict[str, int]:
        """What this rank holds of the model between steps, by part. A frozen model has weights alone."""
        weights_ = sum(parameter.nbytes for chunk in self.chunks for parameter in chunk.parameters())
        shares = list(self._optimizer.shares()) if self._optimizer else []
        held = [(name, tensor.nbytes) for share in shares for name, tensor in share.tensors.items()]
        return {
            "weights": weights_,
            "gradients": sum(buffer.nbytes for buffer in gradient_buffers(self._replicas)),
            "main weights": sum(size for name, size in held if name == "param"),
            "optimizer": sum(size for name, size in held if name != "param"),
        }

    def offload(self) -> Metrics:
        """Hands the device memory of parameters, gradients and optimizer states back, until `reload`.

        Their contents wait in (pinned) host memory. Nothing else may be called before `reload`.
        """
        self.finish_update()
        tensors = chain.from_iterable(chain(chunk.parameters(), chunk.buffers()) for chunk in self.chunks)
        of_optimizer = self._optimizer.tensors() if self._optimizer else ()
        num_bytes = self._offload.release(keep=chain(tensors, of_optimizer), drop=gradient_buffers(self._replicas))
        return {f"{self.name}/offloaded_gib": num_bytes / 2**30}

    def reload(self) -> None:
        """Brings everything back as it was, bit for bit."""
        self._offload.restore()

    def _run(
        self,
        batches: Sequence[Batch],
        on_hidden: Callable[[Tensor, MicroBatch[Batch]], tuple[Tensor, Any]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Runs the pipeline schedule over the batches; the second results of `on_hidden`, on the last stage."""
        self._check_loaded()
        packs = with_fillers(batches, self.mesh)

        def loss_func(pack: MicroBatch[Batch], hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            for replica in self._replicas[-1:]:
                finish_gather(replica)
            loss, result = on_hidden(self._whole(hidden), pack)
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

        models = self._replicas or self.chunks
        dtype = self.model.config.params_dtype
        with platform.megatron_calls():
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[micro_batches(packs, self.mesh, dtype=dtype) for _ in models],
                model=models,
                num_microbatches=len(packs),
                seq_length=packs[0].tokens.shape[0],  # stages tell each other how long a pack really is
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return list(results[: len(batches)])

    def _from_last_stage(self, results: Sequence[Tensor], batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[T] float32 for each batch, which the last stage has, on the CPU of every rank."""
        sizes = [batch.tokens.shape[0] for batch in batches]
        flat = torch.cat(list(results)) if self.mesh.is_last_stage else torch.empty(sum(sizes), device=self.mesh.device)
        return list(self.mesh.broadcast_from_last_stage(flat).cpu().split(sizes))

    def _check_loaded(self) -> None:
        # Reading a storage that is not there would crash the process.
        if self._offload.is_active:
            raise RuntimeError(f"the {self.name} is offloaded; call reload() first")

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
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        loss_mean: LossMean = "token",
        max_response_tokens: int = 0,
        temperature: float = 1.0,
        is_frozen: bool = False,
    ) -> None:
        super().__init__(
            config, mesh, loss_mean=loss_mean, max_response_tokens=max_response_tokens, is_frozen=is_frozen
        )
        self._head_options: dict[str, Any] = {
            "temperature": temperature,
            "vocab_size": self.architecture.vocab_size,
            "tp_group": mesh.tp_group,
        }

    def step_on_policy(self, minibatch: Sequence[Experience], loss: PolicyLoss) -> tuple[Metrics, list[Tensor]]:
        """`step` by the policy that `old_log_probs` are of: its own forward pass finds them. They are returned."""
        return self._update(minibatch, on_policy(loss), keep=lambda output: output.log_probs)

    def _infer_tokens(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        log_probs, _ = linear_log_prob(
            hidden,
            self.model.output_weight,
            batch.targets,
            loss_mask=batch.loss_mask,
            entropy=False,
            **self._head_options,
        )
        return log_probs

    def _weighted_loss(
        self, hidden: Tensor, batch: Batch, loss: Callable[[PolicyOutput, Batch], LossOutput], weights: Tensor
    ) -> tuple[Tensor, PolicyOutput]:
        def loss_of(index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
            output = PolicyOutput(log_probs=log_probs, entropy=entropy)
            return loss(output, batch.select(index)).per_token * weights[index]

        total, log_probs, entropy = linear_token_loss(
            hidden, self.model.output_weight, batch.targets, loss_of, loss_mask=batch.loss_mask, **self._head_options
        )
        mask = batch.loss_mask
        return total, PolicyOutput(log_probs=log_probs[mask], entropy=entropy[mask])


class CriticEngine(MegatronEngine[Tensor]):
    """The critic: values from a linear head on the base model."""

    name = "critic"

    def __init__(
        self,
        config: CriticConfig,
        mesh: Mesh,
        *,
        loss_mean: LossMean = "token",
        max_response_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        architecture = read_architecture(config.path)
        head = ValueHead(architecture.hidden_size, init=config.value_head_init, seed=seed)
        super().__init__(config, mesh, loss_mean=loss_mean, max_response_tokens=max_response_tokens, value_head=head)

    def _infer_tokens(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.model.output_layer(hidden)

    def _weighted_loss(
        self, hidden: Tensor, batch: Batch, loss: Callable[[Tensor, Batch], LossOutput], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        if isinstance(loss, ClippedValueLoss) and isinstance(batch, Experience):
            head = self.model.output_layer.weight
            total, values = linear_value_loss(
                hidden, head, batch.old_values, batch.returns, weights, clip_eps=loss.clip_eps
            )
            return total, values[batch.loss_mask]
        index = batch.loss_mask.nonzero().squeeze(1)
        values = self.model.output_layer(hidden.index_select(0, index))
        total = (loss(values, batch.select(index)).per_token * weights[index]).sum()
        return total, values.detach()
