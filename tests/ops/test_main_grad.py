"""Weight gradients in Megatron's buffer, with the hook of `DistributedDataParallel` written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_orz.ops.log_prob import linear_log_prob
from megatron_orz.ops.token_loss import linear_token_loss
from tests.ops.heads import assert_close, random_head

HEAD = random_head(20, 16, 64)
TOKENS = torch.arange(20) * 7 % 64


def separate(hidden: Tensor, weight: Tensor) -> Tensor:
    log_probs, entropy = linear_log_prob(hidden, weight, HEAD.targets, loss_mask=HEAD.loss_mask)
    return (log_probs + entropy.square()).sum()


def fused(hidden: Tensor, weight: Tensor) -> Tensor:
    def loss(index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
        return log_probs + entropy.square()

    return linear_token_loss(hidden, weight, HEAD.targets, loss, loss_mask=HEAD.loss_mask)[0]


def megatron_parameter(weight: Tensor, *, is_embedding: bool) -> torch.nn.Parameter:
    """A parameter as megatron-core's data parallelism prepares it, under `overlap_grad_reduce`."""
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    if is_embedding:
        parameter.zero_out_wgrad = True  # type: ignore[attr-defined]

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None, "Megatron refuses to overlap without a gradient"
        if not parameter.grad_added_to_main_grad or is_embedding:  # type: ignore[attr-defined]
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(hook)
    return parameter


@pytest.mark.parametrize("loss", [separate, fused])
@pytest.mark.parametrize("is_embedding", [False, True], ids=["untied", "tied"])
def test_main_grad_collects_every_gradient_once(loss: Callable[[Tensor, Tensor], Tensor], is_embedding: bool) -> None:
    """Over two micro-batches; a tied weight gets the embedding's gradient through autograd besides."""

    def run(weight: Tensor) -> None:
        for scale in (1.0, 0.5):
            hidden = F.embedding(TOKENS, weight) if is_embedding else HEAD.hidden
            loss((scale * hidden).requires_grad_(), weight).backward()

    expected = HEAD.weight.clone().requires_grad_()
    run(expected)
    parameter = megatron_parameter(HEAD.weight, is_embedding=is_embedding)
    run(parameter)
    assert expected.grad is not None
    assert parameter.grad is None
    assert_close(parameter.main_grad - 1, expected.grad, 1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", [separate, fused])
def test_a_buffer_of_another_type_is_left_to_the_hook(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = HEAD.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    loss(HEAD.hidden, weight).backward()
    assert weight.grad is not None
    assert weight.grad.any()
    assert not weight.main_grad.any()  # type: ignore[attr-defined]
