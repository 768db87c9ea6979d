"""What a run of the whole loop does, and what it says of its steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_orz.benchmark import countdown


@dataclass(frozen=True, kw_only=True)
class Work:
    """Steps on the same prompts, each of which has responses of a length of its own."""

    folder: Path
    """Where model and prompts lie, and where runs write."""
    response_lengths: tuple[int, ...]
    """Of each prompt, in tokens."""
    num_responses: int
    num_steps: int
    prompt_tokens: int
    max_pack_tokens: int
    trl_rows: int
    """Rollouts in a micro-batch of TRL's."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def prompt_file(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def num_prompts(self) -> int:
        return len(self.response_lengths)

    @property
    def max_response_tokens(self) -> int:
        return max(self.response_lengths)

    @property
    def num_response_tokens(self) -> int:
        """Of a step."""
        return sum(self.response_lengths) * self.num_responses

    def prompts(self) -> list[dict[str, Any]]:
        """The rows of the prompt file."""
        return [json.loads(line) for line in self.prompt_file.read_text().splitlines()]

    def write(self) -> None:
        """Writes model and prompts."""
        countdown.save_model(self.model)
        countdown.write_prompts(self.prompt_file, self.response_lengths, prompt_tokens=self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What was measured of each step of a run."""

    seconds: list[float]
    num_response_tokens: list[int]
    rewards: list[float]
    peak_bytes: int
    """The most memory that existed at once: allocated on a GPU, or resident in the process on a CPU."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of our own runs: time and memory of each phase, tokens per second, MFU, what models hold."""
