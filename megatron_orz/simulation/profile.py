"""What a simulation is made of: lengths of responses, speeds and fixed costs, each with its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Self

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How fast a server decodes: one iteration gives each of n running responses a token, in

        seconds(n) = iteration_s + n response_s

    The first term is what every iteration costs (reading the weights, launching kernels), the second what each response
    adds (its keys and values, its share of the arithmetic, sampling).
    """

    iteration_s: float
    response_s: float
    max_running: int
    """Responses that run together at most; others wait in the server."""

    def __post_init__(self) -> None:
        if self.iteration_s < 0 or self.response_s < 0 or self.iteration_s + self.response_s == 0:
            raise ValueError(
                f"an iteration of {self.iteration_s} s and {self.response_s} s for each response decodes nothing in no "
                "time; neither may be negative, and one must be above 0"
            )
        if self.max_running < 1:
            raise ValueError(f"max_running {self.max_running} lets no response run; set at least 1")

    def seconds(self, num_running: int) -> float:
        """Of one iteration."""
        return self.iteration_s + num_running * self.response_s

    def tokens_per_s(self, num_running: int) -> float:
        """Of all running responses together."""
        return num_running / self.seconds(num_running)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the trainer takes of a token, in GPU-seconds, and of an optimizer step beside its tokens, in seconds."""

    infer_s: float
    critic_s: float
    policy_s: float
    update_s: float
    num_critic_updates: int
    num_policy_updates: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything the time of a step is made of."""

    name: str
    groups: Sequence[Sequence[int]]
    """Response tokens of the siblings of each prompt: the distribution that responses are drawn from."""
    prompt_tokens: float
    """Mean of a prompt."""
    num_prompts: int
    num_responses: int
    max_pack_tokens: int
    decoding: Decoding
    training: Training
    gpus_per_server: int
    gpus_per_replica: int
    """GPUs that hold one copy of policy and critic between them: tp x pp x cp."""
    sync_s: float
    """Of one weight update, during which no server decodes."""
    rollout_s: float
    """Of the trainer's work on a rollout outside of the models: grading, recording."""
    switch_s: float
    """Of one change of turns where servers and trainer share their GPUs; a step has two."""
    trainer_spread: Sequence[float]
    """Seconds of training steps over those expected of them; drawn from for every step."""
    server_spread: Sequence[float]
    """Likewise of generation; drawn from for every server and step."""
    sources: Mapping[str, str]
    """For every other field, where its value is from."""

    def __post_init__(self) -> None:
        if not self.groups or any(min(group, default=0) < 1 for group in self.groups):
            raise ValueError(
                f"profile {self.name} has a prompt without responses, or a response without tokens; remove it"
            )
        if self.longest > self.max_pack_tokens:
            raise ValueError(
                f"profile {self.name} has a response of {self.longest} tokens with its prompt, and packs of "
                f"{self.max_pack_tokens}; raise max_pack_tokens"
            )
        described = {field.name for field in fields(self)} - {"name", "sources"}
        if missing := sorted(described - set(self.sources)):
            raise ValueError(f"profile {self.name} does not say where {', '.join(missing)} is from; add it to sources")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return max(map(max, self.groups)) + round(self.prompt_tokens)

    @property
    def mean_response_tokens(self) -> float:
        return fmean(length for group in self.groups for length in group)

    def draw_groups(self, num_groups: int, num_responses: int, rng: np.random.Generator) -> list[list[int]]:
        """Response lengths of a step's prompts: prompts are drawn anew, and the siblings of each among its own."""
        chosen = rng.integers(len(self.groups), size=num_groups)
        return [rng.choice(np.asarray(self.groups[index]), num_responses).tolist() for index in chosen]

    def with_max_running(self, max_running: int | None) -> Self:
        """With servers that decode other numbers of responses together; None leaves them as they are."""
        return self if max_running is None else replace(self, decoding=replace(self.decoding, max_running=max_running))

    def with_equal_lengths(self) -> Self:
        """The same tokens on average, and no straggler among them."""
        return replace(self, groups=[[max(1, round(self.mean_response_tokens))]])

    def with_equal_speeds(self) -> Self:
        """Every step and every server as fast as the mean."""
        return replace(self, trainer_spread=[1.0], server_spread=[1.0])
