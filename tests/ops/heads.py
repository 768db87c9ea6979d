"""Random output layers, and what they say by definition in float64: the material of the tests beside this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.8


class Head(NamedTuple):
    """Hidden states, an output weight and targets; the mask holds most tokens."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T]
    loss_mask: Tensor  # [T] bool

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Copies of hidden and weight that collect gradients."""
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def shard(self, rank: int, size: int) -> Tensor:
        """A rank's rows of the weight; the vocabulary is padded with rows that a wrong kernel would notice."""
        padding = -len(self.weight) % size
        return F.pad(self.weight, (0, 0, 0, padding), value=9.0).chunk(size)[rank].clone()


def random_head(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Head:
    generator = torch.Generator().manual_seed(num_tokens + vocab_size)
    head = Head(
        hidden=torch.randn(num_tokens, hidden_size, generator=generator).to(dtype),
        weight=(torch.randn(vocab_size, hidden_size, generator=generator) * 0.3).to(dtype),
        targets=torch.randint(0, vocab_size, (num_tokens,), generator=generator),
        loss_mask=torch.rand(num_tokens, generator=generator) < 0.7,
    )
    return Head(*(x.to(device) for x in head))


def by_definition(
    head: Head, hidden: Tensor, weight: Tensor, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from full logits, 0 outside the mask; in the type of hidden and weight."""
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    log_probs = log_p.gather(1, head.targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_probs.where(head.loss_mask, 0.0), entropy.where(head.loss_mask, 0.0)


def exact_leaves(head: Head) -> tuple[Tensor, Tensor]:
    """The given hidden and weight, whatever rounding made of them, in float64."""
    return head.hidden.double().clone().requires_grad_(), head.weight.double().clone().requires_grad_()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors are measured against the largest entry, or against 1: log-probabilities of 0 have the errors of logits."""
    assert actual.shape == expected.shape
    largest = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=0, atol=tolerance * largest)
