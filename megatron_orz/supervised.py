"""Next-token training on the engine of the PPO policy: the base model of the demo, cold starts, distillation."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_orz.algorithms.losses import next_token_loss
from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.config import ModelConfig, ParallelConfig
from megatron_orz.data.packing import pack_sequences
from megatron_orz.logs import RunLog
from megatron_orz.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """One supervised run."""

    run_dir: Path
    """Metrics, and the trained Hugging Face checkpoint in `final/`."""
    model: ModelConfig
    num_steps: int
    """Optimizer steps."""
    num_sequences: int = 256
    """Sequences per step."""
    max_pack_tokens: int = 4096
    """Token budget of a pack, which is also the micro-batch."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    hang_timeout_s: float = 1800.0
    """The run ends when nothing moves on any rank for this long."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_sequences < 1:
            raise ValueError(f"num_steps {self.num_steps} and num_sequences {self.num_sequences} must be at least 1")


def train_supervised(config: SupervisedConfig, sequences: Sequence[tuple[list[int], list[int]]]) -> None:
    """Trains on (prompt_ids, target_ids) pairs, the loss on the targets alone, in an order shuffled each epoch.

    Metrics: `policy/loss` is the cross-entropy in nats per target token. Writes `run_dir/final`.
    """
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    if not sequences:
        raise ValueError("supervised training needs at least one sequence")
    with (
        Watchdog(config.run_dir, timeout_s=config.hang_timeout_s) as watchdog,
        open_mesh(config.parallel, seed=config.seed) as mesh,
        watchdog.watching_peers(),
        RunLog(
            config.run_dir, num_steps=config.num_steps, is_main=mesh.rank == 0, on_progress=watchdog.progress
        ) as log,
    ):
        policy = PolicyEngine(config.model, mesh)
        order = _shuffled_forever(len(sequences), config.seed)
        with log.progress("supervised", total=config.num_steps) as advance:
            for step in range(config.num_steps):
                start = time.perf_counter()
                batches = pack_sequences(
                    [sequences[next(order)] for _ in range(config.num_sequences)],
                    max_pack_tokens=config.max_pack_tokens,
                    dp_size=mesh.dp_size,
                    dp_rank=mesh.dp_rank,
                    pad_multiple=mesh.pack_multiple,
                    seed=config.seed + step,
                )
                metrics = policy.step(batches, next_token_loss)
                num_tokens = sum(len(batch.tokens) for batch in batches) * mesh.dp_size
                log.record(step, metrics | {"tokens_per_s": num_tokens / (time.perf_counter() - start)})
                advance()
        export_hf(
            policy.hf_weights(),
            source=config.model.path,
            target=config.run_dir / "final",
            is_writer=mesh.rank == 0,
        )


def _shuffled_forever(num_items: int, seed: int) -> Iterator[int]:
    """Every index once an epoch, in an order of its own each epoch."""
    for epoch in itertools.count():
        order = list(range(num_items))
        random.Random(seed * 1_000_003 + epoch).shuffle(order)
        yield from order
