"""A bigram policy, a critic that is a table, their fleet and their grader: small enough to learn in a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_orz.types import (
    Experience,
    Grade,
    LossOutput,
    Metrics,
    NamedWeights,
    PackedBatch,
    PolicyLoss,
    PolicyOutput,
    Prompt,
    Rollout,
    ValueLoss,
)

VOCAB_SIZE, STOP, GOAL = 8, 0, 3
LR = 0.2
MAX_RESPONSE_TOKENS = 8
# None ends in the goal, after which a bigram policy learns to stop.
PROMPTS = [
    Prompt(prompt_id=number, token_ids=[1 + number % 7, 4 + number % 4], answer="", source="test")
    for number in range(12)
]


@dataclass
class Run:
    """What happened, in order: (what, content) for every call that the loop made."""

    events: list[tuple[str, Any]] = field(default_factory=list)
    rows: list[Metrics] = field(default_factory=list)

    def contents(self, *kinds: str) -> list[Any]:
        return [content for kind, content in self.events if kind in kinds]

    def column(self, metric: str) -> list[float]:
        return [row[metric] for row in self.rows if metric in row]


class TableModel:
    """Either model: a table of parameters, and a step over the mean of a loss over all response tokens."""

    def __init__(self, name: str, table: Tensor, run: Run) -> None:
        self.name, self.run = name, run
        self.table = table.requires_grad_()
        self.optimizer = torch.optim.Adam([self.table], lr=LR)

    def take_step(self, minibatch: Sequence[Experience], results: Sequence[LossOutput]) -> Metrics:
        self.run.events.append((self.name, list(minibatch)))
        mask = torch.cat([experience.loss_mask for experience in minibatch])
        loss = torch.cat([result.per_token for result in results])[mask].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        means = {
            name: float(torch.cat([result.metrics[name] for result in results])[mask].mean())
            for name in results[0].metrics
        }
        return {f"{self.name}/loss": float(loss.detach())} | means


class BigramPolicy(TableModel):
    """log pi(target | token) from a row of logits for each token."""

    def __init__(self, run: Run) -> None:
        super().__init__("policy", torch.zeros(VOCAB_SIZE, VOCAB_SIZE), run)

    def output(self, batch: PackedBatch) -> PolicyOutput:
        log_p = self.table.log_softmax(-1)[batch.tokens]
        return PolicyOutput(
            log_probs=log_p.gather(1, batch.targets[:, None])[:, 0], entropy=-(log_p.exp() * log_p).sum(-1)
        )

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        return [self.output(batch).log_probs.detach() for batch in batches]

    def step(self, minibatch: Sequence[Experience], loss: PolicyLoss) -> Metrics:
        return self.take_step(minibatch, [loss(self.output(e), e) for e in minibatch])

    def step_on_policy(self, minibatch: Sequence[Experience], loss: PolicyLoss) -> tuple[Metrics, list[Tensor]]:
        log_probs = self.infer(minibatch)
        fresh = [replace(e, old_log_probs=x) for e, x in zip(minibatch, log_probs, strict=True)]
        return self.step(fresh, loss), log_probs

    def hf_weights(self) -> NamedWeights:
        yield "table", self.table.detach()


class TableCritic(TableModel):
    """A value for each token."""

    def __init__(self, run: Run) -> None:
        super().__init__("critic", torch.zeros(VOCAB_SIZE), run)

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        return [self.table.detach()[batch.tokens] for batch in batches]

    def step(self, minibatch: Sequence[Experience], loss: ValueLoss) -> Metrics:
        return self.take_step(minibatch, [loss(self.table[e.tokens], e) for e in minibatch])


class TableFleet:
    """Samples from the table it was last given, and from nothing else."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.log_p, self.version = torch.empty(0), -1

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        self.log_p, self.version = dict(weights)["table"].log_softmax(-1), version
        self.run.events.append(("update", version))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        generator = torch.Generator().manual_seed(seed)
        rollouts = [self.answer(prompt, generator) for prompt in prompts for _ in range(num_responses)]
        self.run.events += [("generate", rollouts), ("seed", seed)]
        return rollouts

    def answer(self, prompt: Prompt, generator: torch.Generator) -> Rollout:
        ids = prompt.token_ids[-1:]
        while len(ids) <= MAX_RESPONSE_TOKENS and ids[-1] != STOP:
            ids.append(int(torch.multinomial(self.log_p[ids[-1]].exp(), 1, generator=generator)))
        return Rollout(
            prompt=prompt,
            response_ids=ids[1:],
            rollout_log_probs=[float(self.log_p[token, target]) for token, target in pairwise(ids)],
            finish_reason="stop" if ids[-1] == STOP else "length",
            policy_version=self.version,
        )


class StaleFleet(TableFleet):
    """The planted fault: says that it has the new weights, and keeps the first ones."""

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        first = self.log_p
        super().update_weights(weights, version)
        self.log_p = first if version > 0 else self.log_p


class GoalGrader:
    """1 for a response that ends in the goal and a stop; formatted is one that stops."""

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        return [
            replace(
                rollout,
                grade=Grade(
                    reward=float(rollout.response_ids[-2:] == [GOAL, STOP]),
                    is_correct=rollout.response_ids[-2:] == [GOAL, STOP],
                    is_formatted=rollout.finish_reason == "stop",
                    timed_out=False,
                    extracted=None,
                ),
            )
            for rollout in rollouts
        ]
