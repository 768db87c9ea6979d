"""The reference of a KL penalty: what it says, what it holds in memory, and when it follows the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_orz.config import KLConfig, ModelConfig, OptimizerConfig, Refresh
from megatron_orz.engine.megatron_engine import PolicyEngine
from megatron_orz.engine.parallel import Mesh
from megatron_orz.engine.reference import ReferenceEngine
from megatron_orz.types import Experience
from tests.engine import tiny
from tests.engine.layouts import policy_loss

OPTIMIZER = OptimizerConfig(lr=1e-2)


def packs() -> list[Experience]:
    sequences = tiny.random_sequences(6)
    return [tiny.concatenate(sequences[:4]), tiny.concatenate(sequences[4:])]


def models(path: Path, mesh: Mesh, refresh: Refresh = "never") -> tuple[PolicyEngine, ReferenceEngine]:
    model = ModelConfig(path=path, optimizer=OPTIMIZER)
    policy = PolicyEngine(model, mesh, temperature=0.7)
    kl = KLConfig(coefficient=0.1, reference=path, refresh=refresh)
    return policy, ReferenceEngine(kl, model, mesh, policy=policy, temperature=0.7, epoch_steps=3)


def log_probs_of(model: PolicyEngine) -> Tensor:
    return torch.cat(model.infer(packs()))


def test_it_says_what_the_untrained_policy_said_bit_for_bit(model_dir: Path, mesh: Mesh) -> None:
    policy, reference = models(model_dir, mesh)
    before = log_probs_of(policy)
    assert torch.equal(log_probs_of(reference), before)
    policy.step(packs(), policy_loss)
    assert not torch.equal(log_probs_of(policy), before)
    reference.refresh(100)
    assert torch.equal(log_probs_of(reference), before)


def test_it_holds_neither_gradients_nor_optimizer_states(model_dir: Path, mesh: Mesh) -> None:
    policy, reference = models(model_dir, mesh)
    num_bytes = sum(parameter.nbytes for parameter in reference.chunks[0].parameters())
    assert all(not hasattr(parameter, "main_grad") for parameter in reference.chunks[0].parameters())
    lent = reference.offload()["reference/offloaded_gib"] * 2**30
    # The rotary angles lie beside the weights.
    assert num_bytes <= lent < 1.5 * num_bytes
    with pytest.raises(RuntimeError, match="the reference is offloaded"):
        reference.copy_weights(policy)
    reference.reload()
    policy.offload()
    with pytest.raises(RuntimeError, match="the policy is offloaded"):
        reference.copy_weights(policy)
    policy.reload()
    assert torch.equal(log_probs_of(reference), log_probs_of(policy))
    with pytest.raises(AssertionError, match="the reference is frozen"):
        reference.step(packs(), policy_loss)


@pytest.mark.parametrize(("refresh", "steps"), [(2, [2, 4]), ("epoch", [3])])
def test_it_becomes_the_policy_when_that_is_due(
    model_dir: Path, mesh: Mesh, refresh: Refresh, steps: list[int]
) -> None:
    policy, reference = models(model_dir, mesh, refresh)
    for step in range(5):
        before = log_probs_of(reference)
        reference.refresh(step)
        expected = log_probs_of(policy) if step in steps else before
        assert torch.equal(log_probs_of(reference), expected), step
        policy.step(packs(), policy_loss)


def test_a_refreshed_reference_goes_on_from_a_checkpoint(model_dir: Path, mesh: Mesh, tmp_path: Path) -> None:
    policy, reference = models(model_dir, mesh, 1)
    policy.step(packs(), policy_loss)
    reference.refresh(1)
    pending = reference.save_state(tmp_path, copy=True)
    pending.write()
    pending.finish([pending.summary])
    _, resumed = models(model_dir, mesh, 1)
    assert not torch.equal(log_probs_of(resumed), log_probs_of(reference))
    resumed.load_state(tmp_path)
    assert torch.equal(log_probs_of(resumed), log_probs_of(reference))


def test_it_cannot_follow_a_policy_of_another_architecture(model_dir: Path, mesh: Mesh, tmp_path: Path) -> None:
    policy, _ = models(model_dir, mesh)
    tiny.save_model(tmp_path / "other", vocab_size=257)
    kl = KLConfig(coefficient=0.1, reference=tmp_path / "other", refresh=1)
    model = ModelConfig(path=model_dir, optimizer=OPTIMIZER)
    with pytest.raises(ValueError, match=r"other has another architecture than the policy.*, or kl\.refresh to never"):
        ReferenceEngine(kl, model, mesh, policy=policy, temperature=1.0, epoch_steps=3)
    other = ReferenceEngine(replace(kl, refresh="never"), model, mesh, policy=policy, temperature=1.0, epoch_steps=3)
    assert other.architecture.vocab_size == 257
