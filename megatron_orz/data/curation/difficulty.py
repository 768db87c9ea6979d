"""How often a model is right: neither never nor nearly always, and rarely for the annealing set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow

from megatron_orz.data.curation.stage import Advance, Candidate, Verdict
from megatron_orz.data.curation.store import Store, digest
from megatron_orz.data.prompts import render
from megatron_orz.types import Fleet, Grader, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sampler: TypeAlias = Callable[[Sequence[Candidate], int, Callable[[], None]], Sequence[int | None]]
"""(candidates, seed, told of each response) -> right responses of each; None where the prompt is too long."""


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Samples responses to every problem, grades them, and drops what teaches nothing."""

    model: Path | None = None
    """Hugging Face checkpoint to sample from; none leaves this stage out."""
    template: str = "orz"
    """Prompt template, as in training."""
    max_prompt_tokens: int = 2048
    """Problems with longer prompts are dropped."""
    num_responses: int = 64
    """Responses to each problem."""
    min_right: int = 1
    """Problems with fewer right responses are dropped."""
    max_pass_rate: float = 0.9
    """Problems with a larger share of right responses are dropped."""
    hard_below: int = 4
    """Problems with fewer right responses than this, none included, are written to hard.jsonl."""
    chunk_problems: int = 256
    """Problems sampled together; what an interrupted run has to sample again is one chunk."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "num_responses", "chunk_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"difficulty.{name} {getattr(self, name)} is not at least 1")
        if self.seed < 0:
            raise ValueError(f"difficulty.seed {self.seed} is negative; set it to 0 or more")
        for name in ("min_right", "hard_below"):
            if not 0 <= getattr(self, name) <= self.num_responses:
                raise ValueError(
                    f"difficulty.{name} {getattr(self, name)} is outside [0, num_responses = {self.num_responses}]"
                )
        if not self.min_right / self.num_responses <= self.max_pass_rate <= 1:
            raise ValueError(
                f"difficulty.max_pass_rate {self.max_pass_rate} is outside [min_right/num_responses = "
                f"{self.min_right}/{self.num_responses}, 1]"
            )

    def judge(
        self,
        candidates: Sequence[Candidate],
        advance: Advance,
        *,
        open_sampler: Callable[[], AbstractContextManager[Sampler]],
        store: Store,
        identity: Any,
    ) -> list[Verdict]:
        """Reasons: `never_right`, `too_easy`, `long_prompt`.

        identity: JSON of what the responses depend on besides these settings. The sampler is opened when the first
        chunk is not in the store.
        """
        num_right: list[int | None] = []
        with ExitStack() as stack:
            sample: Sampler | None = None
            for start in range(0, len(candidates), self.chunk_problems):
                chunk = candidates[start : start + self.chunk_problems]
                name, seed = f"responses/{start:09d}", self.seed * 1_000_003 + start
                asked = [(candidate.text, candidate.answer) for candidate in chunk]
                key = digest(identity, self.template, self.max_prompt_tokens, self.num_responses, seed, asked)
                if (table := store.read(name, key)) is None:
                    sample = sample or stack.enter_context(open_sampler())
                    counts = sample(chunk, seed, lambda: advance(1))
                    table = pyarrow.table({"num_right": pyarrow.array(counts, pyarrow.int32())})
                    store.write(name, key, table)
                else:
                    advance(len(chunk) * self.num_responses)
                num_right += table["num_right"].to_pylist()
        return [self._verdict(count) for count in num_right]

    def is_hard(self, num_right: int | None) -> bool:
        """Whether a problem is for the annealing set."""
        return num_right is not None and num_right < self.hard_below

    def _verdict(self, num_right: int | None) -> Verdict:
        if num_right is None:
            return Verdict("long_prompt", f"the prompt has more than {self.max_prompt_tokens} tokens")
        reason = None
        if num_right < self.min_right:
            reason = "never_right"
        elif num_right > self.max_pass_rate * self.num_responses:
            reason = "too_easy"
        return Verdict(reason, f"{num_right} of {self.num_responses} responses are right", num_right)

    @property
    def settings(self) -> dict[str, Any]:
        """What the verdicts depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("hard_below", "model")}


def fleet_sampler(settings: Difficulty, tokenizer: PreTrainedTokenizerBase, fleet: Fleet, grader: Grader) -> Sampler:
    """A sampler that asks a fleet and grades what it answers."""

    def sample(candidates: Sequence[Candidate], seed: int, on_response: Callable[[], None]) -> list[int | None]:
        texts = [render(settings.template, candidate.text, bos_token=tokenizer.bos_token) for candidate in candidates]
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts = [
            Prompt(prompt_id=candidate.row, token_ids=ids, answer=candidate.answer, source=candidate.file)
            for candidate, ids in zip(candidates, token_ids, strict=True)
            if len(ids) <= settings.max_prompt_tokens
        ]
        asked = {prompt.prompt_id for prompt in prompts}
        if not prompts:
            return [None] * len(candidates)
        rollouts = fleet.generate(prompts, num_responses=settings.num_responses, seed=seed, on_rollout=on_response)
        right = Counter(
            rollout.prompt.prompt_id
            for rollout in grader.grade(rollouts)
            if rollout.grade is not None and rollout.grade.reward > 0
        )
        return [right[candidate.row] if candidate.row in asked else None for candidate in candidates]

    return sample
