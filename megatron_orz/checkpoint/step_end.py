"""What happens between two steps: a checkpoint and an export when they are due, and an orderly stop when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.checkpoint.manifest import Progress
from megatron_orz.checkpoint.preemption import Preemption
from megatron_orz.checkpoint.store import CheckpointStore
from megatron_orz.config import RunConfig
from megatron_orz.data.stream import EpochStream
from megatron_orz.logs import RunLog
from megatron_orz.ranks import Ranks
from megatron_orz.types import Exportable, Stateful


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """Called with the number of finished steps. Collective."""

    config: RunConfig
    num_steps: int
    """Of the whole run."""
    store: CheckpointStore
    parts: Mapping[str, Stateful]
    """All that a checkpoint holds besides `Progress`, by the name of its directory."""
    sources: Mapping[str, Path]
    """The model directory behind a part, whose config and tokenizer go with it; others may be named, too."""
    policy: Exportable
    chat_template: str
    """Of the exported tokenizer."""
    stream: EpochStream[Any]
    log: RunLog
    ranks: Ranks
    preemption: Preemption

    def __call__(self, num_done: int) -> None:
        checkpoint, num_steps = self.config.checkpoint, self.num_steps
        is_stopping = self.preemption.is_requested()
        with self.log.span("checkpoint"):
            self.store.poll()
            if is_stopping or _is_due(num_done, checkpoint.interval, num_steps):
                self._save(num_done)
            if checkpoint.export_interval and num_done % checkpoint.export_interval == 0:
                self._export(num_done)
            if is_stopping or num_done == num_steps:
                self.store.wait()
        if is_stopping:
            self.preemption.stop()

    def _save(self, num_done: int) -> None:
        progress = Progress(step=num_done, prompt_cursor=self.stream.cursor, metrics_bytes=self.log.flush())
        sources = {name: path for name, path in self.sources.items() if name in self.parts}
        self.store.save(progress, self.parts, sources=sources)

    def _export(self, num_done: int) -> None:
        with self.ranks.share_fate("exporting the policy"):
            export_hf(
                self.policy.hf_weights(),
                source=self.sources["policy"],
                target=self.config.run_dir / "exports" / f"step-{num_done:08d}",
                is_writer=self.ranks.rank == 0,
                chat_template=self.chat_template,
            )


def _is_due(num_done: int, interval: int, num_steps: int) -> bool:
    return interval > 0 and (num_done % interval == 0 or num_done == num_steps)
