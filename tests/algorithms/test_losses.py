"""Losses against hand-derived gradients and other projects' formulas, weights against explicit loops."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.losses import (
    ClippedValueLoss,
    WeightedLosses,
    entropy_loss,
    loss_totals,
    next_token_loss,
    policy_loss,
    token_weights,
)
from megatron_orz.types import Experience, LossMean, LossOutput, PackedBatch, PolicyOutput
from tests.algorithms.packs import random_batch, random_experience

EPS = 0.2
LENGTHS = [(3, 40), (1, 1), (5, 60)]


def output_near(experience: Experience, scale: float = 0.4) -> PolicyOutput:
    """A policy output whose ratios lie on both sides of the clip range."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(len(experience.tokens), generator=generator) * scale
    log_probs = (experience.old_log_probs + noise).requires_grad_()
    return PolicyOutput(log_probs=log_probs, entropy=torch.rand(len(noise), generator=generator))


def test_policy_loss_equals_the_paper_token_by_token() -> None:
    experience = random_experience(LENGTHS)
    output = output_near(experience)
    loss = policy_loss(output, experience, clip_eps=EPS)
    rows = zip(
        loss.per_token.tolist(),
        loss.metrics["policy/clip_share"].tolist(),
        loss.metrics["policy/approx_kl"].tolist(),
        (output.log_probs - experience.old_log_probs).tolist(),
        experience.advantages.tolist(),
        experience.loss_mask.tolist(),
        strict=True,
    )
    for value, is_clipped, kl, log_ratio, advantage, in_response in rows:
        if not in_response:
            continue
        rho = math.exp(log_ratio)
        surrogate = min(rho * advantage, min(max(rho, 1 - EPS), 1 + EPS) * advantage)
        assert value == pytest.approx(-surrogate, abs=1e-6)
        assert is_clipped == ((rho > 1 + EPS and advantage > 0) or (rho < 1 - EPS and advantage < 0))
        assert kl == pytest.approx(rho - 1 - log_ratio, abs=1e-6)


def test_importance_weights_multiply_the_loss_of_each_token() -> None:
    experience = random_experience(LENGTHS)
    weights = torch.rand(len(experience.tokens), generator=torch.Generator().manual_seed(4)) * 2
    output = output_near(experience)
    plain = policy_loss(output, experience, clip_eps=EPS)
    weighed = policy_loss(output, replace(experience, importance_weights=weights), clip_eps=EPS)
    torch.testing.assert_close(weighed.per_token, weights * plain.per_token)
    some = torch.tensor([4, 9, 30])
    selected = replace(experience, importance_weights=weights).select(some)
    assert selected.importance_weights is not None
    assert selected.importance_weights.tolist() == weights[some].tolist()


def test_policy_gradient_is_minus_ratio_times_advantage_and_0_where_clipped() -> None:
    experience = random_experience(LENGTHS)
    output = output_near(experience)
    loss = policy_loss(output, experience, clip_eps=EPS)
    (gradient,) = torch.autograd.grad(loss.per_token.sum(), output.log_probs)

    ratio = (output.log_probs - experience.old_log_probs).exp().detach()
    up, down = experience.advantages > 0, experience.advantages < 0
    is_clipped = (up & (ratio > 1 + EPS)) | (down & (ratio < 1 - EPS))
    expected = torch.where(is_clipped | ~experience.loss_mask, 0.0, -ratio * experience.advantages)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    # Every branch is there to be tested.
    assert (is_clipped & up).any()
    assert (is_clipped & down).any()
    assert (~is_clipped & (ratio > 1 + EPS)).any()
    assert (~is_clipped & (ratio < 1 - EPS)).any()


def test_on_policy_gradient_is_reinforce() -> None:
    """At pi = pi_old the surrogate's gradient is -A, whatever the clip range."""
    experience = random_experience(LENGTHS)
    log_probs = experience.old_log_probs.clone().requires_grad_()
    loss = policy_loss(PolicyOutput(log_probs=log_probs, entropy=log_probs), experience, clip_eps=EPS)
    (gradient,) = torch.autograd.grad(loss.per_token.sum(), log_probs)
    expected = torch.where(experience.loss_mask, -experience.advantages, 0.0)
    torch.testing.assert_close(gradient, expected)
    assert loss.metrics["policy/clip_share"].max() == 0
    assert loss.metrics["policy/approx_kl"].abs().max() == 0
    assert (loss.metrics["policy/ratio"] == 1).all()


def test_policy_loss_passes_gradcheck_away_from_the_kinks() -> None:
    experience = random_experience([(1, 6)])
    doubled = {
        name: getattr(experience, name).double() for name in ("old_log_probs", "old_values", "advantages", "returns")
    }
    experience = Experience.from_batch(experience, **doubled)
    offsets = torch.tensor([0.0, 0.05, -0.05, 0.4, -0.4, 0.1, -0.1], dtype=torch.float64)
    log_probs = (experience.old_log_probs + offsets).requires_grad_()

    def loss_of(x: Tensor) -> Tensor:
        return policy_loss(PolicyOutput(log_probs=x, entropy=x), experience, clip_eps=EPS).per_token

    assert torch.autograd.gradcheck(loss_of, log_probs)


def test_extreme_prompt_tokens_neither_overflow_nor_reach_the_gradient() -> None:
    experience = random_experience([(2, 3)])
    log_probs = experience.old_log_probs.clone()
    log_probs[0] += 1000.0
    log_probs.requires_grad_()
    loss = policy_loss(PolicyOutput(log_probs=log_probs, entropy=log_probs), experience, clip_eps=EPS)
    (loss.per_token * experience.loss_mask).sum().backward()
    assert loss.per_token.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad[:2].tolist() == [0.0, 0.0]


def test_metrics_carry_no_gradient() -> None:
    experience = random_experience(LENGTHS)
    output = output_near(experience)
    entropy = output.log_probs * 1.0
    losses = [
        policy_loss(PolicyOutput(log_probs=output.log_probs, entropy=entropy), experience, clip_eps=EPS),
        ClippedValueLoss(EPS)(entropy, experience),
        next_token_loss(PolicyOutput(log_probs=output.log_probs, entropy=entropy), experience),
    ]
    for loss in losses:
        assert loss.per_token.requires_grad
        assert loss.metrics
        assert not any(metric.requires_grad for metric in loss.metrics.values())
        assert {metric.shape for metric in loss.metrics.values()} == {loss.per_token.shape}


def test_the_upper_clip_range_may_be_another() -> None:
    """DAPO's clip-higher: only a positive advantage with a ratio between the ranges is treated otherwise."""
    experience = random_experience(LENGTHS)
    output = output_near(experience)
    loss = policy_loss(output, experience, clip_eps=EPS, clip_eps_high=0.6)
    for t in experience.loss_mask.nonzero().squeeze(1).tolist():
        rho = math.exp(output.log_probs[t].item() - experience.old_log_probs[t].item())
        advantage = float(experience.advantages[t])
        surrogate = min(rho * advantage, min(max(rho, 1 - EPS), 1 + 0.6) * advantage)
        assert loss.per_token[t].item() == pytest.approx(-surrogate, abs=1e-6)
    plain = policy_loss(output, experience, clip_eps=EPS).per_token
    ratio = (output.log_probs - experience.old_log_probs).exp()
    gains = experience.loss_mask & (ratio > 1 + EPS) & (experience.advantages > 0)
    assert gains.any()
    assert torch.equal(loss.per_token != plain, gains)


def test_losses_add_up_with_their_coefficients_and_keep_all_metrics() -> None:
    experience = random_experience(LENGTHS)
    output = output_near(experience)
    surrogate = partial(policy_loss, clip_eps=EPS)
    infinite = LossOutput(
        per_token=torch.full((len(experience.tokens),), math.inf), metrics={"policy/x": output.entropy}
    )
    loss = WeightedLosses([(1.0, surrogate), (0.01, entropy_loss), (0.0, lambda *_: infinite)])(output, experience)
    expected = surrogate(output, experience).per_token - 0.01 * output.entropy
    torch.testing.assert_close(loss.per_token, expected)
    assert loss.metrics.keys() == {*surrogate(output, experience).metrics, "policy/x"}


def test_clipped_value_loss_equals_the_formula_token_by_token() -> None:
    experience = random_experience(LENGTHS)
    noise = torch.randn(len(experience.tokens), generator=torch.Generator().manual_seed(5))
    values = (experience.old_values + 0.5 * noise).requires_grad_()
    loss = ClippedValueLoss(EPS)(values, experience)
    (gradient,) = torch.autograd.grad(loss.per_token.sum(), values)
    num_clipped = 0
    rows = zip(*(x.tolist() for x in (values, experience.old_values, experience.returns)), strict=True)
    for t, (v, old, target) in enumerate(rows):
        v_clipped = min(max(v, old - EPS), old + EPS)
        is_clipped = (v_clipped - target) ** 2 > (v - target) ** 2
        assert loss.per_token[t].item() == pytest.approx(
            0.5 * max((v - target) ** 2, (v_clipped - target) ** 2), abs=1e-5
        )
        assert loss.metrics["critic/clip_share"][t].item() == is_clipped
        # A value that has left the range towards its return gets no further push; any other is pulled to it.
        assert gradient[t].item() == pytest.approx(0.0 if is_clipped else v - target, abs=1e-5)
        num_clipped += is_clipped
    assert 0 < num_clipped < len(values)


def test_values_within_the_range_are_never_clipped() -> None:
    """V_old + (V - V_old) is not V in floating point; taken for a clipped value, it would count in the metric."""
    experience = random_experience([(0, 1000)])
    values = (experience.old_values + EPS * torch.linspace(-0.999, 0.999, 1000)).requires_grad_()
    loss = ClippedValueLoss(EPS)(values, experience)
    (gradient,) = torch.autograd.grad(loss.per_token.sum(), values)
    assert not loss.metrics["critic/clip_share"].any()
    torch.testing.assert_close(gradient, values.detach() - experience.returns, rtol=1e-6, atol=0)


def test_value_loss_without_clipping_is_half_the_squared_error() -> None:
    experience = random_experience(LENGTHS)
    values = experience.old_values + 10.0
    loss = ClippedValueLoss(0)(values, experience)
    torch.testing.assert_close(
        loss.per_token, 0.5 * torch.nn.functional.mse_loss(values, experience.returns, reduction="none")
    )
    assert loss.metrics["critic/clip_share"].max() == 0
    torch.testing.assert_close(loss.metrics["critic/value"], values)


def test_next_token_loss_is_cross_entropy() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 0, 10, 7, 7])
    log_probs = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    loss = next_token_loss(PolicyOutput(log_probs=log_probs, entropy=log_probs), random_batch([(2, 3)]))
    torch.testing.assert_close(loss.per_token, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


# Two ranks; a response of one token, a sequence and a whole pack without loss tokens.
MAX_RESPONSE_TOKENS = 16
RANKS = [
    [[(2, 3), (1, 1), (4, 6)], [(3, 5)]],
    [[(1, 2), (5, 0), (2, 7)], [(4, 0)], [(4, 4), (1, 9)]],
]


def sequences_of(batch: PackedBatch) -> list[slice]:
    bounds = batch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


def mean_by_loops(packs: list[tuple[PackedBatch, Tensor]], mean: LossMean) -> float:
    """The mean of (batch, per-token loss) pairs, as one would say it."""

    def average(values: list[float]) -> float:
        return sum(values) / len(values)

    tokens, pack_means, sequence_means, sequence_sums = [], [], [], []
    for batch, loss in packs:
        of_pack = [x for x, inside in zip(loss.tolist(), batch.loss_mask.tolist(), strict=True) if inside]
        tokens += of_pack
        if of_pack:
            pack_means.append(average(of_pack))
        for span in sequences_of(batch):
            if of_sequence := loss[span][batch.loss_mask[span]].tolist():
                sequence_means.append(average(of_sequence))
                sequence_sums.append(sum(of_sequence) / MAX_RESPONSE_TOKENS)
    means = {"token": tokens, "pack": pack_means, "sequence": sequence_means, "constant": sequence_sums}
    return average(means[mean])


@pytest.mark.parametrize("mean", ["token", "pack", "sequence", "constant"])
def test_weighted_sum_over_ranks_is_the_mean(mean: LossMean) -> None:
    ranks = [[random_batch(lengths) for lengths in rank] for rank in RANKS]
    totals = torch.stack([loss_totals(rank) for rank in ranks]).sum(0)
    generator = torch.Generator().manual_seed(0)
    packs = [(b, torch.randn(len(b.tokens), generator=generator)) for rank in ranks for b in rank]
    weights = [token_weights(batch, mean, totals, max_response_tokens=MAX_RESPONSE_TOKENS) for batch, _ in packs]

    weighted = sum((w * loss).sum().item() for w, (_, loss) in zip(weights, packs, strict=True))
    assert weighted == pytest.approx(mean_by_loops(packs, mean), abs=1e-6)
    # With a constant length, a response that is shorter has less weight.
    whole = mean_by_loops([(batch, torch.ones_like(loss)) for batch, loss in packs], mean)
    assert sum(w.sum().item() for w in weights) == pytest.approx(whole, abs=1e-6)
    assert whole == pytest.approx(1) if mean != "constant" else whole < 0.5
    assert all(
        w.dtype == torch.float32 and w[~batch.loss_mask].abs().sum() == 0
        for w, (batch, _) in zip(weights, packs, strict=True)
    )


def test_loss_totals_count_what_holds_loss_tokens() -> None:
    totals = [loss_totals([random_batch(lengths) for lengths in rank]).tolist() for rank in RANKS]
    assert totals == [[15, 2, 4], [22, 2, 4]]
    assert loss_totals([]).tolist() == [0, 0, 0]


def test_token_weights_of_the_documented_example() -> None:
    first, second = random_batch([(0, 1), (0, 3)]), random_batch([(0, 2)])
    totals = loss_totals([first, second])
    expected: dict[LossMean, tuple[list[float], list[float]]] = {
        "token": ([1 / 6] * 4, [1 / 6] * 2),
        "pack": ([1 / 8] * 4, [1 / 4] * 2),
        "sequence": ([1 / 3, 1 / 9, 1 / 9, 1 / 9], [1 / 6] * 2),
        "constant": ([1 / 12] * 4, [1 / 12] * 2),
    }
    for mean, (of_first, of_second) in expected.items():
        torch.testing.assert_close(token_weights(first, mean, totals, max_response_tokens=4), torch.tensor(of_first))
        torch.testing.assert_close(token_weights(second, mean, totals, max_response_tokens=4), torch.tensor(of_second))


@pytest.mark.parametrize("mean", ["token", "pack", "sequence", "constant"])
def test_a_mini_batch_without_loss_tokens_has_zero_weights(mean: LossMean) -> None:
    batch = random_batch([(4, 0)])
    assert token_weights(batch, mean, loss_totals([batch]), max_response_tokens=8).tolist() == [0.0] * 4
