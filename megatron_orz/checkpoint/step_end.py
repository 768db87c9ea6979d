"""What happens between two steps: a checkpoint and an export when they are due, and an orderly stop when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.checkpoint.manifest import Progress
from megatron_orz.checkpoint.preemption import Preemption
from megatron_orz.checkpoint.store import CheckpointStore
from megatron_orz.config import Config
from megatron_orz.data.prompts import PromptStream
from megatron_orz.logs import RunLog
from megatron_orz.ranks import Ranks
from megatron_orz.types import Policy, Stateful


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """Called with the number of finished steps. Collective."""

    config: Config
    store: CheckpointStore
    parts: Mapping[str, Stateful]
    """All that a checkpoint holds besides `Progress`, by the name of its directory."""
    policy: Policy
    prompts: PromptStream
    log: RunLog
    ranks: Ranks
    preemption: Preemption

    def __call__(self, num_done: int) -> None:
        checkpoint, num_steps = self.config.checkpoint, self.config.ppo.num_steps
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
        progress = Progress(step=num_done, prompt_cursor=self.prompts.cursor, metrics_bytes=self.log.flush())
        config = self.config
        paths = {"policy": config.policy.path, "reference": config.kl.reference}
        if config.critic is not None:
            paths["critic"] = config.critic.path
        sources = {name: path for name, path in paths.items() if path is not None and name in self.parts}
        self.store.save(progress, self.parts, sources=sources)

    def _export(self, num_done: int) -> None:
        with self.ranks.share_fate("exporting the policy"):
            export_hf(
                self.policy.hf_weights(),
                source=self.config.policy.path,
                target=self.config.run_dir / "exports" / f"step-{num_done:08d}",
                is_writer=self.ranks.rank == 0,
            )


def _is_due(num_done: int, interval: int, num_steps: int) -> bool:
    return interval > 0 and (num_done % interval == 0 or num_done == num_steps)
