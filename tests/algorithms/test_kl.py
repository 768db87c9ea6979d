"""Estimators of the divergence from a reference: their formulas, their expectations and their gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.kl import ESTIMATORS, kl_loss, with_kl_penalty
from megatron_orz.types import Experience, KLEstimator, PolicyOutput
from tests.algorithms.packs import random_experience

LENGTHS = [(3, 10), (1, 1), (5, 20)]
VOCAB_SIZE = 6


def formula(estimator: KLEstimator, log_prob: float, ref_log_prob: float) -> float:
    log_ratio = log_prob - ref_log_prob
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return math.exp(ref_log_prob - log_prob) - 1 - (ref_log_prob - log_prob)


def with_reference() -> tuple[Experience, Tensor]:
    """An experience, and log-probabilities of a policy that has left the reference; float64."""
    experience = random_experience(LENGTHS)
    generator = torch.Generator().manual_seed(4)
    log_probs, ref_log_probs = -torch.rand(2, len(experience.tokens), generator=generator, dtype=torch.float64) * 3
    return replace(experience, ref_log_probs=ref_log_probs), log_probs


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_loss_equals_the_estimator_token_by_token(estimator: KLEstimator) -> None:
    experience, log_probs = with_reference()
    loss = kl_loss(PolicyOutput(log_probs=log_probs, entropy=log_probs), experience, estimator=estimator)
    rows = zip(loss.per_token.tolist(), log_probs.tolist(), experience.ref_log_probs.tolist(), strict=True)
    for (value, log_prob, ref_log_prob), in_response in zip(rows, experience.loss_mask.tolist(), strict=True):
        expected = formula(estimator, log_prob, ref_log_prob) if in_response else 0.0
        assert value == pytest.approx(expected, abs=1e-12)
    assert loss.metrics["policy/reference_kl"].tolist() == loss.per_token.tolist()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_taken_from_the_rewards_of_response_tokens(estimator: KLEstimator) -> None:
    experience, log_probs = with_reference()
    penalised = with_kl_penalty(experience, log_probs, experience.ref_log_probs, estimator=estimator, coefficient=0.3)
    for t, in_response in enumerate(experience.loss_mask.tolist()):
        kl = formula(estimator, log_probs[t].item(), experience.ref_log_probs[t].item()) if in_response else 0.0
        assert penalised.rewards[t].item() == pytest.approx(experience.rewards[t].item() - 0.3 * kl, abs=1e-6)
    assert penalised.tokens is experience.tokens


def expectation_and_gradient(estimator: KLEstimator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all outcomes x ~ pi: the mean estimate and the mean gradient of it in the logits; then KL and pi, ref."""
    generator = torch.Generator().manual_seed(1)
    logits, ref = torch.randn(2, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_p, log_ref = logits.log_softmax(0), ref.log_softmax(0)
    estimates = ESTIMATORS[estimator](log_p - log_ref)
    weights = log_p.exp().detach()
    (gradient,) = torch.autograd.grad((weights * estimates).sum(), logits)
    return (weights * estimates).sum().detach(), gradient, log_p.detach(), log_ref


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: KLEstimator) -> None:
    mean, _, log_p, log_ref = expectation_and_gradient(estimator)
    assert mean.item() == pytest.approx((log_p.exp() * (log_p - log_ref)).sum().item(), rel=1e-12)


def test_the_gradients_are_those_the_documentation_names() -> None:
    """k1: none on average; k2: of KL(pi || ref); k3: of KL(ref || pi), which is pi - ref in the logits."""
    _, k1, log_p, log_ref = expectation_and_gradient("k1")
    assert k1.abs().max() < 1e-15
    logits = log_p.clone().requires_grad_()
    reverse = (logits.log_softmax(0).exp() * (logits.log_softmax(0) - log_ref)).sum()
    (expected,) = torch.autograd.grad(reverse, logits)
    torch.testing.assert_close(expectation_and_gradient("k2")[1], expected)
    torch.testing.assert_close(expectation_and_gradient("k3")[1], log_p.exp() - log_ref.exp())
