"""AdamW on Megatron shards: mixed precision, clipping, schedule, and a guard against non-finite gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_orz.config import OptimizerConfig

MAX_SKIPPED_UPDATES = 3
"""Non-finite gradients in a row after which the run stops."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, beside it."""

CLIP_EPS = 1e-6
"""Beside the norm that gradients are divided by, as PyTorch and megatron-core have it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What this rank's optimizer holds of one parameter."""

    parameter: torch.nn.Parameter
    """The model's, this rank's tensor-parallel shard."""
    start: int
    """The first of its elements, flattened."""
    tensors: dict[str, Tensor]
    """[n] each: the moments `exp_avg` and `exp_avg_sq`; for bfloat16 models the float32 copy, `param`."""
    is_own: bool
    """No other data-parallel rank holds these elements."""


class Optimizer:
    """One model's optimizer and schedule. Every call is collective over the model's ranks."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, name: str) -> None:
        transformer: TransformerConfig = chunks[0].config
        self._config = config
        self._name = name
        self._chunks = chunks
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=transformer.bf16,
                params_dtype=transformer.params_dtype,
                use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
                overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
            ),
            list(chunks),
        )
        assert config.decay == "constant" or config.decay_steps is not None
        self._parts: list[Any] = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        # One pass over the weights; PyTorch's default makes one for each operation of the formula.
        for group in self._optimizer.param_groups:
            group["fused"] = True
        # Besides the warm-up, the scheduler is what makes megatron-core spare biases and norms from weight decay.
        self._schedule = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=config.decay_steps or config.warmup_steps + 1,
            lr_decay_style=config.decay,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        self._schedule.step(1)  # The n-th update of the warm-up runs at n / warmup_steps of the rate.
        self._skipped_in_a_row = 0
        self._num_updates = 0

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def tensors(self) -> Iterator[Tensor]:
        """The parameters it updates (for bfloat16 models float32 copies) and, after the first step, their moments."""
        for part in self._parts:
            if (optimizer := part.optimizer) is None:  # this rank has no share of the parameters
                continue
            for group in optimizer.param_groups:
                yield from group["params"]
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def step(self) -> dict[str, float]:
        """Clips and applies the gradients, unless they are not finite: then the weights stay as they are.

        Returns {grad_norm, lr, skipped_updates}. Raises RuntimeError after MAX_SKIPPED_UPDATES skips in a row.
        """
        lr = self.lr
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        is_finite = math.isfinite(grad_norm)
        if is_finite:
            self._skipped_in_a_row = 0
            self._clip(grad_norm)
            self._optimizer.step_with_ready_grads()
            self._num_updates += 1
        else:
            self._skipped_in_a_row += 1
            logger.warning("%s: gradient norm is %s; the update is skipped", self._name, grad_norm)
            if self._skipped_in_a_row >= MAX_SKIPPED_UPDATES:
                raise RuntimeError(
                    f"{self._name}: the gradients of {MAX_SKIPPED_UPDATES} updates in a row are not finite; "
                    "lower the learning rate or look at the data of the last steps"
                )
        self._schedule.step(1)
        return {"grad_norm": grad_norm, "lr": lr, "skipped_updates": float(not is_finite)}

    def shares(self) -> Iterator[Share]:
        """All that the optimizer holds beside the model: live tensors, which may be read and filled."""
        for part in self._parts:
            if part.optimizer is None:
                continue
            for parameter, main, start in _held_parameters(part):
                state = part.optimizer.state[main]
                if not state:  # before its first step
                    state.update({name: torch.zeros_like(main.detach()) for name in MOMENTS})
                    self._set_steps(part.optimizer)
                tensors = {name: state[name].view(-1) for name in MOMENTS}
                if parameter.dtype != main.dtype:
                    tensors["param"] = main.detach().view(-1)
                is_own = isinstance(part, DistributedOptimizer)
                yield Share(parameter=parameter, start=start, tensors=tensors, is_own=is_own)

    def counters(self) -> dict[str, int]:
        """All that it counts: the same on every rank."""
        return {
            "num_updates": self._num_updates,
            "schedule_steps": self._schedule.num_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Goes on counting where another optimizer stopped: bias correction, warm-up and skipped updates."""
        self._num_updates = counters["num_updates"]
        self._skipped_in_a_row = counters["skipped_in_a_row"]
        self._schedule.num_steps = counters["schedule_steps"]
        self._schedule.step(0)
        for part in self._parts:
            if part.optimizer is not None:
                self._set_steps(part.optimizer)

    def _set_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """PyTorch's AdamW counts the steps of each parameter apart, in a tensor; fused ones those of a group."""
        for group in optimizer.param_groups:
            if not isinstance(optimizer, torch.optim.Adam):
                group["step"] = self._num_updates
                continue
            for main in group["params"]:
                # One tensor for all would be counted up once for each parameter.
                if state := optimizer.state[main]:
                    state["step"] = torch.tensor(float(self._num_updates), dtype=torch.float32, device=main.device)

    def _clip(self, grad_norm: float) -> None:
        if self._config.clip_grad == 0:
            return
        coefficient = self._config.clip_grad / (grad_norm + CLIP_EPS)
        if coefficient >= 1:
            return
        for part in self._parts:
            if grads := [p.grad for p in part.get_parameters() if p.grad is not None]:
                torch._foreach_mul_(grads, coefficient)


def _held_parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
    """(parameter of the model, the tensor that is updated for it, the first element this is of the flat parameter)."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, index) in part.model_param_group_index_map.items():
            start = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, part.optimizer.param_groups[group]["params"][index], start
        return
    of_main: dict[int, torch.nn.Parameter] = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            of_main |= {id(main): parameter for main, parameter in zip(mains, parameters, strict=True)}
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            yield of_main.get(id(main), main), main, 0
