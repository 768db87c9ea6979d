"""Prompts, their verifier, and held-out evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_orz.config.checks import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training prompts and the packs made of their rollouts."""

    train: tuple[Path, ...]
    """Prompt files: .json in the recipe's form, .jsonl or .parquet with the columns below."""
    problem_column: str = "question"
    answer_column: str = "answer"
    template: str = "orz"
    """Name of a built-in prompt template (`orz`, `short`), or a text that holds `{problem}`."""
    max_prompt_tokens: int = 2048
    """Longer prompts are dropped and counted."""
    max_pack_tokens: int = 16384
    """Token budget of a pack, which is also the micro-batch."""
    max_prompts: int | None = None
    """Use only the first prompts of each file."""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train names no file; give at least one prompt file")
        require(self.max_prompt_tokens >= 1, f"data.max_prompt_tokens {self.max_prompt_tokens} is not at least 1")
        require(
            self.max_prompts is None or self.max_prompts >= 1,
            f"data.max_prompts {self.max_prompts} is not at least 1; leave it out for all prompts",
        )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The rule-based verifier."""

    timeout_s: float = 5.0
    """Deadline of one comparison; past it the answer counts as timed out, with reward 0."""
    num_workers: int = 2
    """Verifier processes."""

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, f"reward.timeout_s {self.timeout_s} is not positive")
        require(self.num_workers >= 1, f"reward.num_workers {self.num_workers} is not at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out prompts, answered and graded like the training prompts."""

    data: tuple[Path, ...] = ()
    """Prompt files; none turns evaluation off."""
    interval: int = 10
    """Evaluate before the first step, after every `interval` steps, and after the last one."""
    num_responses: int = 4
    """Responses per prompt: the score is avg@k for this k."""
    max_prompts: int | None = None
    """Use only the first prompts of each file."""

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"evaluation.interval {self.interval} is not at least 1")
        require(self.num_responses >= 1, f"evaluation.num_responses {self.num_responses} is not at least 1")
        require(
            self.max_prompts is None or self.max_prompts >= 1,
            f"evaluation.max_prompts {self.max_prompts} is not at least 1; leave it out for all prompts",
        )
