"""Next-token training against transformers' own cross-entropy."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_orz.config import ModelConfig, OptimizerConfig
from megatron_orz.logs import read_metrics
from megatron_orz.supervised import SupervisedConfig, train_supervised
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS = 6


def make_sequences() -> list[tuple[list[int], list[int]]]:
    """Prompts and targets of many lengths; a step takes each of them once."""
    rng = random.Random(0)

    def tokens(longest: int) -> list[int]:
        return [rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(1, longest))]

    return [(tokens(12), tokens(20)) for _ in range(16)]


def cross_entropy(path: Path, sequences: list[tuple[list[int], list[int]]]) -> float:
    """Nats per target token by transformers: labels of -100 are left out."""
    model = AutoModelForCausalLM.from_pretrained(path)
    total, count = 0.0, 0
    for prompt, target in sequences:
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.no_grad():
            loss = model(torch.tensor([prompt + target]), labels=labels).loss
        total, count = total + float(loss) * len(target), count + len(target)
    return total / count


def train(path: Path, run_dir: Path, num_steps: int) -> list[float]:
    """Losses of the steps."""
    config = SupervisedConfig(
        run_dir=run_dir,
        model=ModelConfig(path=path, optimizer=OptimizerConfig(lr=3e-3)),
        num_steps=num_steps,
        num_sequences=16,
        max_pack_tokens=64,
    )
    train_supervised(config, make_sequences())
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(num_steps))
    return [row["policy/loss"] for row in rows]


def test_the_loss_is_transformers_cross_entropy_before_and_after_training(tmp_path: Path) -> None:
    """The loss of step n is that of the checkpoint which n steps leave behind: training and export are one model."""
    tiny.save_model(tmp_path / "base", tied=True)
    losses = train(tmp_path / "base", tmp_path / "long", NUM_STEPS + 1)
    assert losses[0] == pytest.approx(cross_entropy(tmp_path / "base", make_sequences()), rel=1e-4)

    assert train(tmp_path / "base", tmp_path / "short", NUM_STEPS) == losses[:NUM_STEPS]
    after = cross_entropy(tmp_path / "short" / "final", make_sequences())
    assert losses[NUM_STEPS] == pytest.approx(after, rel=1e-4)
    # Sixteen sequences of random tokens are soon learned by heart.
    assert fmean(losses[-2:]) < losses[0] - 1


def test_an_empty_data_set_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    config = SupervisedConfig(
        run_dir=tmp_path / "run", model=ModelConfig(path=tmp_path, optimizer=OptimizerConfig(lr=1.0)), num_steps=1
    )
    with pytest.raises(ValueError, match="at least one sequence"):
        train_supervised(config, [])
    assert not (tmp_path / "run").exists()
