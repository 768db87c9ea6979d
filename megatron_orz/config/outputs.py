"""What a run writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron_orz.config.checks import require

Tracker: TypeAlias = Literal["wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What an interrupted run resumes from: `docs/reliability.md`."""

    interval: int = 10
    """Save the training state after every `interval` steps, and after the last; 0: only when a signal ends the run."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those of every `keep_every`-th step; 0 keeps none of them."""
    asynchronous: bool = True
    """Write during the next step, from a copy in host memory of what the rank holds; else training waits."""
    export_interval: int = 0
    """Export the policy to `exports/`, in the Hugging Face form, after every so many steps; 0 exports only the last."""
    grace_s: float = 60.0
    """After SIGTERM or SIGUSR1, how long the step may take to end before the run stops without a checkpoint of it."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_every", "export_interval"):
            require(getattr(self, name) >= 0, f"checkpoint.{name} {getattr(self, name)} is negative; 0 turns it off")
        require(
            self.keep >= 1, f"checkpoint.keep {self.keep} is not at least 1; set checkpoint.interval to 0 to save none"
        )
        require(self.grace_s > 0, f"checkpoint.grace_s {self.grace_s} is not positive")
        require(
            self.keep_every == 0 or (self.interval > 0 and self.keep_every % self.interval == 0),
            f"checkpoint.keep_every {self.keep_every} is not a multiple of checkpoint.interval {self.interval}, "
            "so that no checkpoint would be kept; make it one",
        )


@dataclass(frozen=True, kw_only=True)
class GenerationsConfig:
    """The rollouts of a step as a parquet file, for people and for analysis."""

    interval: int = 1
    """Save those of every `interval`-th step; 0 saves none."""
    max_mib: float = 64.0
    """Largest file. What a step has beyond it is left out, from the last prompt on, and counted."""

    def __post_init__(self) -> None:
        require(self.interval >= 0, f"generations.interval {self.interval} is negative; 0 saves none")
        require(
            self.interval == 0 or self.max_mib > 0,
            f"generations.max_mib {self.max_mib} holds no rollout; set generations.interval to 0 to save none",
        )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Experiment trackers that get the metrics beside metrics.jsonl and TensorBoard, which every run writes."""

    trackers: tuple[Tracker, ...] = ()
    """Each is a package that has to be installed, such as by `pip install megatron_orz[wandb]`."""
    project: str = "megatron_orz"
    """Where the trackers file the run, under the name of its directory."""

    def __post_init__(self) -> None:
        require(
            len(set(self.trackers)) == len(self.trackers),
            f"tracking.trackers {self.trackers} names one twice; name each once",
        )
        require(self.project != "", "tracking.project is empty; name a project")
