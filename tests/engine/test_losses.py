"""What the engine shows a loss, and that fusing a loss with its head changes nothing but the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.algorithms.losses import ClippedValueLoss
from megatron_orz.config import CriticConfig, ModelConfig, OptimizerConfig
from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
from megatron_orz.engine.parallel import Mesh
from megatron_orz.types import Experience, LossOutput, Metrics, PolicyOutput
from tests.engine import layouts, tiny

OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-4)


def packs() -> list[Experience]:
    sequences = tiny.random_sequences(6)
    return [tiny.concatenate(sequences[:4]), tiny.concatenate(sequences[4:]), tiny.empty_pack()]


def test_the_fused_value_loss_trains_as_any_other_callable(model_dir: Path, mesh: Mesh) -> None:
    def train(loss: Callable[[Tensor, Experience], LossOutput]) -> tuple[list[Metrics], Tensor]:
        critic = CriticEngine(CriticConfig(path=model_dir, optimizer=OPTIMIZER), mesh, seed=1)
        metrics = [critic.step(packs(), loss) for _ in range(3)]
        return metrics, torch.cat(critic.infer(packs()))

    fused = ClippedValueLoss(0.2)
    metrics, values = train(fused)
    plain_metrics, plain_values = train(lambda values, experience: fused(values, experience))
    for actual, expected in zip(metrics, plain_metrics, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
        assert 0 < actual["critic/clip_share"] < 1
    torch.testing.assert_close(values, plain_values, rtol=1e-4, atol=1e-4)


def test_losses_see_loss_tokens_alone(model_dir: Path, mesh: Mesh) -> None:
    """Each of them with gradients once, and once more for the metrics."""
    batch = tiny.concatenate(tiny.random_sequences(6))
    seen: dict[bool, list[Experience]] = {True: [], False: []}

    def policy_loss(output: PolicyOutput, experience: Experience) -> LossOutput:
        assert output.log_probs.shape == output.entropy.shape == experience.targets.shape
        seen[output.log_probs.requires_grad].append(experience)
        return LossOutput(per_token=-output.log_probs, metrics={"policy/advantage": experience.advantages})

    def value_loss(values: Tensor, experience: Experience) -> LossOutput:
        assert values.shape == experience.targets.shape
        seen[values.requires_grad].append(experience)
        return LossOutput(per_token=values, metrics={"critic/advantage": experience.advantages})

    for name, step in (
        ("policy", PolicyEngine(ModelConfig(path=model_dir, optimizer=OPTIMIZER), mesh).step([batch], policy_loss)),
        ("critic", CriticEngine(CriticConfig(path=model_dir, optimizer=OPTIMIZER), mesh).step([batch], value_loss)),
    ):
        assert step[f"{name}/advantage"] == pytest.approx(batch.advantages[batch.loss_mask].mean().item(), rel=1e-5)
    for experiences in seen.values():
        assert all(experience.loss_mask.all() for experience in experiences)
        for field in ("targets", "advantages", "old_log_probs", "position_ids"):
            of_policy, of_critic = torch.cat([getattr(e, field) for e in experiences]).chunk(2)
            assert torch.equal(of_policy, getattr(batch, field)[batch.loss_mask])
            assert torch.equal(of_critic, of_policy)


def test_a_loss_that_asks_for_sequences_fails(model_dir: Path, mesh: Mesh) -> None:
    def of_sequences(output: PolicyOutput, experience: Experience) -> LossOutput:
        lengths = experience.cu_seqlens.diff()
        return LossOutput(per_token=output.log_probs * lengths.repeat_interleave(lengths), metrics={})

    with pytest.raises(RuntimeError, match="size of tensor"):
        PolicyEngine(ModelConfig(path=model_dir, optimizer=OPTIMIZER), mesh).step(packs(), of_sequences)


def test_a_constant_length_weighs_every_token_alike_whatever_the_mini_batch(model_dir: Path, mesh: Mesh) -> None:
    """The gradients of the mean over tokens, times their number over that of 6 responses of 32 tokens."""

    def train(**options: Any) -> Metrics:
        model = ModelConfig(path=model_dir, optimizer=OPTIMIZER)
        return PolicyEngine(model, mesh, **options).step(packs(), layouts.policy_loss)

    token, constant = train(loss_mean="token"), train(loss_mean="constant", max_response_tokens=32)
    factor = sum(int(pack.loss_mask.sum()) for pack in packs()) / (6 * 32)
    for name in ("policy/loss", "policy/grad_norm"):
        assert constant[name] == pytest.approx(factor * token[name], rel=1e-4)
    assert constant["policy/entropy"] == pytest.approx(token["policy/entropy"], rel=1e-5)
