"""A critic comes to explain returns that its states show, and the metric says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_orz.algorithms.advantages import explained_variance
from megatron_orz.algorithms.losses import ClippedValueLoss
from megatron_orz.config import CriticConfig, OptimizerConfig
from megatron_orz.engine.megatron_engine import CriticEngine
from megatron_orz.engine.parallel import Mesh
from megatron_orz.types import Experience
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD, BAD = 7, 8


def marked(num: int, seed: int) -> Experience:
    """One pack of sequences whose return is 1 where the prompt ends in GOOD, and 0 where it ends in BAD."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for number in range(num):
        ids = torch.randint(10, tiny.VOCAB_SIZE, (14,), generator=generator).tolist()
        mark = GOOD if number % 2 else BAD
        sequence = tiny.experience([*ids[:4], mark], ids[4:], generator)
        outcome = torch.full_like(sequence.returns, float(mark == GOOD))
        sequences.append(replace(sequence, returns=outcome, old_values=torch.zeros_like(outcome)))
    return tiny.concatenate(sequences)


def test_a_critic_learns_what_the_states_show(model_dir: Path, mesh: Mesh) -> None:
    """With value clipping, around the values before each update as in a run."""
    config = CriticConfig(path=model_dir, optimizer=OptimizerConfig(lr=2e-3, warmup_steps=5))
    critic = CriticEngine(config, mesh, seed=1)
    held_out = marked(16, seed=1000)

    def quality() -> float:
        [values] = critic.infer([held_out])
        return explained_variance([replace(held_out, old_values=values)], mesh.dp_all_gather)

    before = quality()
    for step in range(40):
        pack = marked(16, seed=step)
        pack = replace(pack, old_values=critic.infer([pack])[0])
        critic.step([pack], ClippedValueLoss(0.2))
    assert before < 0.5
    assert quality() > 0.8
