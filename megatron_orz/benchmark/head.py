"""Log-probabilities of a language-model head: ours beside what else computes them.

Three tasks: `log-prob` without gradient; `log-prob-gradient`, forward and then backward from given gradients;
`token-loss`, PPO's clipped surrogate and its gradients, which may be computed together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_orz.benchmark.group import (
    OURS,
    Group,
    Row,
    Target,
    error_at_most,
    faster_than,
    memory_at_most,
    share_of_floor,
    smaller_than,
)
from megatron_orz.benchmark.measure import Run
from megatron_orz.ops.log_prob import linear_log_prob
from megatron_orz.ops.token_loss import linear_token_loss

TASKS = ("log-prob", "log-prob-gradient", "token-loss")
NUM_CHECKED_TOKENS = 256
CHUNK_TOKENS = 512
CLIP_EPS = 0.2

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, targets) -> log_probs [T], differentiable."""


@dataclass(frozen=True)
class HeadShape:
    num_tokens: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"T={self.num_tokens} H={self.hidden_size} V={self.vocab_size}"


SHAPES = {
    "smollm2": HeadShape(4096, 576, 49152),
    "0.5b": HeadShape(32768, 896, 151936),
    "7b": HeadShape(32768, 3584, 152064),
    "32b": HeadShape(32768, 5120, 152064),
}


@dataclass(frozen=True)
class Head:
    """Hidden states and an output weight whose logits have mean 0 and variance 1, and what a loss needs."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]; below float32 with a main_grad in float32, as in training
    targets: Tensor  # [T]
    gradient: Tensor  # [T] float32, of the loss in each log-probability, for log-prob-gradient
    old_log_probs: Tensor  # [T] float32
    advantages: Tensor  # [T] float32

    @classmethod
    def random(cls, shape: HeadShape, device: torch.device, dtype: torch.dtype) -> "Head":
        t, h, v = shape.num_tokens, shape.hidden_size, shape.vocab_size
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        weight = normal(v, h, dtype=dtype).requires_grad_()
        if dtype.itemsize < 4:
            weight.main_grad = torch.zeros(v, h, device=device)  # type: ignore[attr-defined]
        return cls(
            hidden=normal(t, h, dtype=dtype).mul_(h**-0.5).requires_grad_(),
            weight=weight,
            targets=torch.randint(v, (t,), generator=generator, device=device),
            gradient=normal(t),
            old_log_probs=normal(t).mul_(0.5).sub_(math.log(v) + 0.5),
            advantages=normal(t),
        )

    def part(self, num_tokens: int) -> "Head":
        """As many tokens, evenly spaced, with the same weight."""
        index = torch.linspace(0, len(self.targets) - 1, num_tokens, device=self.targets.device).long()
        hidden = self.hidden.detach()[index].requires_grad_()
        of_tokens = (x[index] for x in (self.targets, self.gradient, self.old_log_probs, self.advantages))
        return Head(hidden, self.weight, *of_tokens)

    def clear_gradients(self) -> None:
        """Leaves a main_grad as it is: training clears it once for many micro-batches."""
        self.hidden.grad = self.weight.grad = None

    def losses(self, index: Tensor | slice, log_probs: Tensor) -> Tensor:
        """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) of some tokens."""
        ratio = (log_probs - self.old_log_probs[index]).exp()
        advantages = self.advantages[index]
        return torch.maximum(-ratio * advantages, -ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS) * advantages)


@dataclass(frozen=True)
class Implementation:
    log_prob: LogProb | None = None
    total_loss: Callable[[Head], Tensor] | None = None
    """A loss of its own, with gradients; by default PPO's from log_prob."""
    is_cross_entropy: bool = False
    """The total loss is the sum of -log_probs, which needs less than PPO's."""
    note: str = ""


def run(implementation: Implementation, task: str, head: Head) -> Tensor:
    """Does the task; returns the log-probabilities, or the loss."""
    if task == "log-prob":
        assert implementation.log_prob is not None
        with torch.no_grad():
            return implementation.log_prob(head.hidden, head.weight, head.targets)
    head.clear_gradients()
    if task == "log-prob-gradient":
        assert implementation.log_prob is not None
        log_probs = implementation.log_prob(head.hidden, head.weight, head.targets)
        log_probs.backward(head.gradient.to(log_probs.dtype))
        return log_probs.detach()
    if implementation.total_loss is not None:
        loss = implementation.total_loss(head)
    else:
        assert implementation.log_prob is not None
        loss = head.losses(slice(None), implementation.log_prob(head.hidden, head.weight, head.targets)).sum()
    loss.backward()
    return loss.detach()


def group(task: str, shape_name: str, shape: HeadShape, device: torch.device, dtype: torch.dtype) -> Group:
    head = Head.random(shape, device, dtype)
    part = head.part(min(NUM_CHECKED_TOKENS, shape.num_tokens))
    exact = cache(partial(exact_outputs, part, task))
    rows, missing = {}, {}
    for name, load in implementations(device, task).items():
        try:
            implementation = load()
        except (ImportError, AttributeError) as error:
            missing[name] = f"not installed ({error})" if isinstance(error, ImportError) else f"not there ({error})"
            continue
        if implementation.log_prob is None and task != "token-loss":
            continue
        rows[name] = Row(
            run=partial(run, implementation, task, head),
            errors=partial(errors_of, implementation, task, part, exact),
            note=implementation.note,
            forget=head.clear_gradients,
        )
    low = dtype.itemsize < 4
    return Group(
        task=task,
        shape=f"{shape_name}: {shape}, {str(dtype).removeprefix('torch.')}",
        rows=rows,
        missing=missing,
        floor=partial(matrix_products, head),
        floor_counts=FLOOR_COUNTS[task],
        # Half-precision logits are off by up to 2^-9 of themselves, and so are gradients.
        limits={"log-prob": 0.1, "loss": 0.05, "gradient": 0.05} if low else dict.fromkeys(ERRORS, 1e-4),
        our_limits={"log-prob": 1e-4, "loss": 1e-4, "gradient": 0.01 if low else 1e-4},
        targets=targets(task, shape_name, shape, device, dtype),
    )


# ---- Floors and targets ----

FLOOR_COUNTS = {
    "log-prob": {"matmul logits": 1},
    "log-prob-gradient": {"matmul logits": 2, "matmul d_hidden": 1, "matmul d_weight": 1},
    "token-loss": {"matmul logits": 1, "matmul d_hidden": 1, "matmul d_weight": 1},
}


def matrix_products(head: Head) -> Mapping[str, Run]:
    """Those no implementation can do without, in one piece each, by the library that is fastest at them."""
    hidden, weight = head.hidden.detach(), head.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "matmul logits": lambda: torch.mm(hidden, weight.t(), out=logits),
        "matmul d_hidden": lambda: torch.mm(logits, weight, out=d_hidden),
        "matmul d_weight": lambda: torch.mm(logits.t(), hidden, out=d_weight),
    }


def targets(task: str, shape_name: str, shape: HeadShape, device: torch.device, dtype: torch.dtype) -> list[Target]:
    if device.type == "cpu":
        if shape_name != "smollm2" or task == "log-prob":
            return []
        return [faster_than("eager", 1.2 if task == "log-prob-gradient" else 1.4), smaller_than("eager", 10)]
    if shape_name == "0.5b" and task == "log-prob":
        return [share_of_floor(0.65), error_at_most("log-prob", 1e-4)]
    if shape_name != "7b":
        return []
    if task == "log-prob":
        competitors = [
            faster_than("verl", 1.5),
            faster_than("cut-cross-entropy", 1.5),
            faster_than("cut-cross-entropy, unfiltered", 1.5),
            faster_than("chunked", 2.5),
        ]
        return [share_of_floor(0.85), error_at_most("log-prob", 1e-4), *competitors]
    gradient_bytes = shape.num_tokens * shape.hidden_size * dtype.itemsize
    return [
        share_of_floor(0.8),
        memory_at_most((4 << 30) + gradient_bytes, "at most 4 GiB beside the gradient of the hidden states"),
    ]


# ---- What is exact ----

ERRORS = ("log-prob", "loss", "gradient")


def exact_outputs(head: Head, task: str, is_cross_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities or loss, and the gradients of hidden and weight, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (head.hidden, head.weight))
    log_probs = eager_log_prob(hidden, weight, head.targets)
    if task != "token-loss":
        log_probs.backward(head.gradient.double())
        result = log_probs
    else:
        result = -log_probs.sum() if is_cross_entropy else head.losses(slice(None), log_probs).sum()
        result.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return result.detach(), hidden.grad, weight.grad


def errors_of(
    implementation: Implementation, task: str, head: Head, exact: Callable[[bool], tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """Largest absolute error of a log-probability, relative error of a loss and of gradients (in the 2-norm)."""
    main_grad: Tensor | None = getattr(head.weight, "main_grad", None)
    if main_grad is not None:
        main_grad.zero_()
    result = run(implementation, task, head).double()
    expected, *gradients = exact(implementation.is_cross_entropy)
    if task == "token-loss":
        errors = {"loss": float((result - expected).abs() / expected.abs())}
    else:
        errors = {"log-prob": float((result - expected).abs().max())}
    if task != "log-prob":
        d_weight = main_grad if head.weight.grad is None else head.weight.grad
        assert head.hidden.grad is not None
        assert d_weight is not None
        actual = (head.hidden.grad.double(), d_weight.double())
        errors["gradient"] = max(float((a - e).norm() / e.norm()) for a, e in zip(actual, gradients, strict=True))
    head.clear_gradients()
    return errors


# ---- Implementations ----


def implementations(device: torch.device, task: str) -> dict[str, Callable[[], Implementation]]:
    """Loaders by name; those that raise ImportError need a package that is not here."""
    loaders: dict[str, Callable[[], Implementation]] = {OURS: lambda: Implementation(_our_log_prob, _our_total_loss)}
    if task == "token-loss":
        loaders[f"{OURS}, separate"] = lambda: Implementation(_our_log_prob)
    loaders |= {
        "eager": lambda: Implementation(eager_log_prob),
        "torch.compile": lambda: Implementation(torch.compile(eager_log_prob, dynamic=False)),
        "chunked": lambda: Implementation(_chunked_log_prob),
    }
    if task == "token-loss":
        loaders["F.linear_cross_entropy"] = _torch_linear_cross_entropy
    if device.type == "cuda":
        loaders |= {
            "liger, sm_90": _liger_sm90,
            "liger": _liger,
            "cut-cross-entropy": partial(_cut_cross_entropy, "auto"),
            "cut-cross-entropy, unfiltered": partial(_cut_cross_entropy, None),
            "verl": _verl,
        }
    return loaders


def _our_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_log_prob(hidden, weight, targets)[0]


def _our_total_loss(head: Head) -> Tensor:
    def losses(index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
        return head.losses(index, log_probs)

    return linear_token_loss(head.hidden, head.weight, head.targets, losses)[0]


def eager_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def _chunked_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunks of tokens, each computed again in the backward pass."""
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(eager_log_prob, h, weight, t, use_reentrant=False) for h, t in chunks])


def _torch_linear_cross_entropy() -> Implementation:
    linear_cross_entropy, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()  # torch 2.13

    def total_loss(head: Head) -> Tensor:
        return linear_cross_entropy(head.hidden, head.weight, head.targets, reduction="sum", options=options)

    return Implementation(total_loss=total_loss, is_cross_entropy=True, note="cross-entropy")


def _liger() -> Implementation:
    module: Any = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return Implementation(
        total_loss=lambda head: loss(head.weight, head.hidden, head.targets),
        is_cross_entropy=True,
        note="cross-entropy",
    )


def _liger_sm90() -> Implementation:
    module: Any = import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    apply = module.LigerFusedScaledCrossEntropySM90Function.apply
    return Implementation(lambda hidden, weight, targets: -apply(hidden, weight, targets), note="without entropy")


def _cut_cross_entropy(filter_eps: str | None) -> Implementation:
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -function(hidden, weight, targets, reduction="none", filter_eps=filter_eps)

    return Implementation(log_prob, note="without entropy")


def _verl() -> Implementation:
    function = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return Implementation(lambda hidden, weight, targets: function(hidden, weight, targets, 1.0, "none")[0])
