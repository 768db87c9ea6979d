"""A critic as a run leaves it, loaded in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from megatron_orz.algorithms.losses import ClippedValueLoss
from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.config import CriticConfig, OptimizerConfig, ParallelConfig
from megatron_orz.engine.megatron_engine import CriticEngine
from megatron_orz.engine.parallel import open_mesh
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_call_loads_the_values_of_the_trained_critic(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base")
    sequences = tiny.random_sequences(4)
    with open_mesh(ParallelConfig(), seed=0) as mesh:
        config = CriticConfig(path=tmp_path / "base", optimizer=OptimizerConfig(lr=1e-3))
        critic = CriticEngine(config, mesh, seed=3)
        before = critic.infer(sequences)
        critic.step(sequences, ClippedValueLoss(0.0))
        expected = critic.infer(sequences)
        weights = critic.hf_weights()
        export_hf(weights, source=tmp_path / "base", target=tmp_path / "final-critic", is_writer=True)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "final-critic").eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final-critic").eval()
    with torch.no_grad():
        for sequence, values, old_values in zip(sequences, expected, before, strict=True):
            assert torch.allclose(model(sequence.tokens[None]).logits[0, :, 0], values, atol=1e-5)
            assert (values - old_values).abs().max() > 1e-3
            assert reward_model(sequence.tokens[None]).logits.item() == pytest.approx(values[-1].item(), abs=1e-5)
