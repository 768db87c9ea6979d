"""The critic's head under the clipped value loss, with its gradients: ours beside autograd's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_orz.benchmark.group import OURS, Group, Row, faster_than
from megatron_orz.benchmark.head import HeadShape
from megatron_orz.benchmark.measure import Run
from megatron_orz.ops.value_loss import linear_value_loss

TASK = "value-loss"
NUM_CHECKED_TOKENS = 1024
CLIP_EPS = 0.2


@dataclass(frozen=True)
class ValueHead:
    hidden: Tensor  # [T, H]
    head: Tensor  # [1, H]
    old_values: Tensor  # [T] float32, as the next two
    returns: Tensor
    weights: Tensor  # three quarters of the tokens count

    @classmethod
    def random(cls, shape: HeadShape, device: torch.device, dtype: torch.dtype) -> "ValueHead":
        t, h = shape.num_tokens, shape.hidden_size
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        weights = torch.rand(t, generator=generator, device=device)
        return cls(
            hidden=normal(t, h, dtype=dtype).requires_grad_(),
            head=normal(1, h, dtype=dtype).mul_(h**-0.5).requires_grad_(),
            old_values=normal(t),
            returns=normal(t),
            weights=torch.where(weights < 0.75, weights, 0.0),
        )

    def part(self, num_tokens: int) -> "ValueHead":
        """The first tokens, with the same head."""
        of_tokens = (x[:num_tokens] for x in (self.old_values, self.returns, self.weights))
        return ValueHead(self.hidden.detach()[:num_tokens].requires_grad_(), self.head, *of_tokens)

    def clear_gradients(self) -> None:
        self.hidden.grad = self.head.grad = None


Loss = Callable[[ValueHead], Tensor]


def run(loss: Loss, value_head: ValueHead) -> Tensor:
    value_head.clear_gradients()
    total = loss(value_head)
    total.backward()
    return total.detach()


def group(shape_name: str, shape: HeadShape, device: torch.device, dtype: torch.dtype) -> Group:
    value_head = ValueHead.random(shape, device, dtype)
    part = value_head.part(min(NUM_CHECKED_TOKENS, shape.num_tokens))
    exact = cache(partial(_exact_outputs, part))
    losses: dict[str, Loss] = {
        OURS: _our_loss,
        "eager": _eager_loss,
        "torch.compile": torch.compile(_eager_loss, dynamic=False),
    }
    low = dtype.itemsize < 4
    return Group(
        task=TASK,
        shape=f"{shape_name}: T={shape.num_tokens} H={shape.hidden_size}, {str(dtype).removeprefix('torch.')}",
        rows={
            name: Row(
                run=partial(run, loss, value_head),
                errors=partial(_errors, loss, part, exact),
                forget=value_head.clear_gradients,
            )
            for name, loss in losses.items()
        },
        floor=partial(_copy, value_head),
        floor_counts={"copy hidden": 1},
        limits={"loss": 0.05, "gradient": 0.05} if low else {"loss": 1e-4, "gradient": 1e-4},
        our_limits={"loss": 1e-4, "gradient": 0.005 if low else 1e-5},
        targets=[faster_than("eager", 1.0)],
    )


def _our_loss(x: ValueHead) -> Tensor:
    return linear_value_loss(x.hidden, x.head, x.old_values, x.returns, x.weights, clip_eps=CLIP_EPS)[0]


def _eager_loss(x: ValueHead) -> Tensor:
    values = F.linear(x.hidden, x.head).squeeze(1)
    values = values if values.dtype == torch.float64 else values.float()
    clipped = values.clamp(x.old_values - CLIP_EPS, x.old_values + CLIP_EPS)
    return (0.5 * x.weights * torch.maximum((values - x.returns).square(), (clipped - x.returns).square())).sum()


def _copy(x: ValueHead) -> Mapping[str, Run]:
    """Reads and writes as much as reading the hidden states and writing their gradient."""
    hidden, d_hidden = x.hidden.detach(), torch.empty_like(x.hidden)
    return {"copy hidden": lambda: d_hidden.copy_(hidden)}


def _exact_outputs(x: ValueHead) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = (tensor.detach().double().requires_grad_() for tensor in (x.hidden, x.head))
    loss = run(_eager_loss, ValueHead(hidden, head, *(v.double() for v in (x.old_values, x.returns, x.weights))))
    assert hidden.grad is not None
    assert head.grad is not None
    return loss, hidden.grad, head.grad


def _errors(loss: Loss, x: ValueHead, exact: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Relative errors of the loss and of its gradients (in the 2-norm)."""
    actual = run(loss, x).double()
    expected, *gradients = exact()
    assert x.hidden.grad is not None
    assert x.head.grad is not None
    pairs = zip((x.hidden.grad.double(), x.head.grad.double()), gradients, strict=True)
    return {
        "loss": float((actual - expected).abs() / expected.abs()),
        "gradient": max(float((a - e).norm() / e.norm()) for a, e in pairs),
    }
