"""What flows through a run, and the two interfaces the PPO loop needs.

    Prompt --generate--> Rollout --grade--> Rollout --pack--> PackedBatch --estimate--> Experience

Letters in shapes: T packed tokens, B sequences in a pack, V vocabulary, H hidden size.

One alignment rule: every [T] array is aligned with `targets`. `log_probs[t]` is the log-probability of
`targets[t]`; `values[t]` is the value of the state from which `targets[t]` is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, device

FinishReason: TypeAlias = Literal["stop", "length", "abort"]
AnswerKind: TypeAlias = Literal["math", "choice", "code"]
"""How an answer is graded: as a value, as the letter of an option, or as a program that passes tests."""
Metrics: TypeAlias = dict[str, float]
NamedWeights: TypeAlias = Iterator[tuple[str, Tensor]]
"""Hugging Face names and whole (unsharded) tensors, in a fixed order."""


class RepeatableWeights(Iterator[tuple[str, Tensor]]):
    """Weights that can be gathered once more from the start: the servers they were meant for may die midway.

    gather_first: gathers them for the first rank alone; gather_stage: for every rank, those of its pipeline stage. Each
    where that takes less.
    """

    def __init__(
        self,
        gather: Callable[[], NamedWeights],
        *,
        gather_first: Callable[[], NamedWeights] | None = None,
        gather_stage: Callable[[], NamedWeights] | None = None,
    ) -> None:
        self._gather = gather
        self._gather_first = gather_first or gather
        self._gather_stage = gather_stage or gather
        self._items = gather()

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._items)

    def again(self) -> RepeatableWeights:
        """The same weights from the start. Collective, like every iteration."""
        return RepeatableWeights(self._gather, gather_first=self._gather_first, gather_stage=self._gather_stage)

    def on_first_rank(self) -> RepeatableWeights:
        """The same weights from the start, on the first rank; others may get a part of them. Collective."""
        return RepeatableWeights(self._gather_first)

    def of_stage(self) -> RepeatableWeights:
        """From the start, the weights of this rank's pipeline stage. Collective over its ranks."""
        return RepeatableWeights(self._gather_stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem, already rendered and tokenised: no text is tokenised after this point."""

    prompt_id: int
    token_ids: list[int]
    answer: str
    source: str
    """Name of the data file the problem comes from."""
    kind: AnswerKind = "math"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One conversation to learn from, already rendered and tokenised."""

    token_ids: list[int]
    loss_mask: list[bool]
    """True for a token to be learnt, which the first cannot be: nothing comes before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The verdict of a verifier on one response."""

    reward: float
    is_correct: bool
    """The extracted answer equals the reference, however the response ended."""
    is_formatted: bool
    """An answer could be extracted at all."""
    timed_out: bool
    """The comparison ran into its deadline: the reward is 0, but the answer is not known to be wrong."""
    extracted: str | None


class Swap(NamedTuple):
    """Newer weights that took over within a response."""

    token: int
    """Index of the first response token they sampled, above 0."""
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response to a prompt, as token ids sampled by a server."""

    prompt: Prompt
    response_ids: list[int]
    rollout_log_probs: list[float]
    """The server's own log-probability of each response token, under the sampling distribution."""
    finish_reason: FinishReason
    policy_version: int
    """Of the weights that sampled the first token."""
    swaps: tuple[Swap, ...] = ()
    """Where newer weights took over, in order; most often nowhere."""
    grade: Grade | None = None

    @property
    def num_tokens(self) -> int:
        """Positions the response occupies in a pack: the last token is a target only, never an input."""
        return len(self.prompt.token_ids) + len(self.response_ids) - 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(policy version, number of tokens it sampled), in the order of the response."""
        versions = [self.policy_version, *(swap.version for swap in self.swaps)]
        bounds = [0, *(swap.token for swap in self.swaps), len(self.response_ids)]
        return [(version, end - start) for version, (start, end) in zip(versions, pairwise(bounds), strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Sequences laid end to end. Inputs are `tokens`; what each position predicts is `targets`.

    A sequence of n tokens fills n - 1 positions. For a prompt [p0 p1] and a response [r0 r1]:

        tokens      p0     p1     r0
        targets     p1     r0     r1
        loss_mask   False  True   True
    """

    tokens: Tensor  # [T] int64
    targets: Tensor  # [T] int64, shifted here and nowhere else
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: Tensor  # [B + 1] int32, first 0, last T
    max_seqlen: int
    loss_mask: Tensor  # [T] bool, True where the target is a response token
    rewards: Tensor  # [T] float32, the rollout's reward at its last response token, else 0
    rollout_log_probs: Tensor  # [T] float32, 0 outside the response

    def to(self, target: device | str) -> Self:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(target, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def token_arrays(self) -> dict[str, Tensor]:
        """Every [T] array that is there, by the name of its field."""
        return {
            field.name: value
            for field in fields(self)
            if field.name != "cu_seqlens" and isinstance(value := getattr(self, field.name), Tensor)
        }

    def select(self, index: Tensor) -> Self:
        """The tokens at `index`, [n] int64, alone, as a loss sees them: every [T] array becomes [n].

        They belong to no sequences: `cu_seqlens` is empty, and what asks it for sequences fails.
        """
        selected: dict[str, Any] = {name: x.index_select(0, index) for name, x in self.token_arrays().items()}
        return replace(self, **selected, cu_seqlens=self.cu_seqlens[:0], max_seqlen=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience(PackedBatch):
    """A packed batch with what the policy and the critic said of it before the update."""

    old_log_probs: Tensor  # [T] float32, log pi_old(targets[t])
    old_values: Tensor  # [T] float32, V_old; zeros without a critic
    ref_log_probs: Tensor  # [T] float32, log pi_ref(targets[t]); zeros without a reference
    advantages: Tensor  # [T] float32
    returns: Tensor  # [T] float32
    importance_weights: Tensor | None = None  # [T] float32, of each token's loss; None: 1

    @classmethod
    def from_batch(
        cls,
        batch: PackedBatch,
        *,
        old_log_probs: Tensor,
        old_values: Tensor,
        advantages: Tensor,
        returns: Tensor,
        ref_log_probs: Tensor | None = None,
        importance_weights: Tensor | None = None,
    ) -> Experience:
        """Adds the estimates to a batch; every array is [T] float32, and there may be no reference, and no weights."""
        return cls(
            **{field.name: getattr(batch, field.name) for field in fields(PackedBatch)},
            old_log_probs=old_log_probs,
            old_values=old_values,
            ref_log_probs=torch.zeros_like(old_log_probs) if ref_log_probs is None else ref_log_probs,
            advantages=advantages,
            returns=returns,
            importance_weights=importance_weights,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOutput:
    """What a policy says of the tokens of a pack, or of some of them."""

    log_probs: Tensor  # [T] float32, natural log, after temperature
    entropy: Tensor  # [T] float32, nats


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss before any reduction: the engine applies the weights and the sums.

    Losses are token-level: element t depends on element t of what the loss is given, and on nothing else. The engine
    shows them loss tokens only, a part of a pack at a time (`PackedBatch.select`), and then all of those once more for
    the metrics, without gradients.
    """

    per_token: Tensor  # [T] float32, differentiable
    metrics: Mapping[str, Tensor]  # name -> [T]; logged as the mean over loss tokens


PolicyLoss: TypeAlias = Callable[[PolicyOutput, Experience], LossOutput]
ValueLoss: TypeAlias = Callable[[Tensor, Experience], LossOutput]
LossMean: TypeAlias = Literal["token", "pack", "sequence", "constant"]
"""What every term of the loss is averaged over: all loss tokens of the mini-batch; the tokens of a pack,
then the packs; the tokens of a sequence, then the sequences; as `sequence`, but with the sum over a sequence divided by
the length of the longest response allowed, not by its own."""
AdvantageKind: TypeAlias = Literal["gae", "group_normalised", "group_centred", "leave_one_out"]
"""Where advantages come from: a critic, or the rewards of a prompt's other responses (`group_advantages.py`)."""
ImportanceLevel: TypeAlias = Literal["token", "sequence"]
"""Whose probabilities an importance weight compares: those of a token, or of its whole response."""
KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]
"""How the divergence from a reference is estimated: `algorithms/kl.py`."""
LearnedTokens: TypeAlias = Literal["responses", "all"]
"""What supervised training learns of a conversation: the responses alone, or every token."""


Loss = TypeVar("Loss", contravariant=True)


class Trainable(Protocol[Loss]):
    """A model, one shard of which lives on this rank. Every call is collective."""

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """A [T] float32 tensor for each batch, on the CPU."""
        ...

    def step(self, minibatch: Sequence[Experience], loss: Loss) -> Metrics:
        """One optimizer step on this rank's share of a mini-batch."""
        ...


class Exportable(Protocol):
    """A model whose weights can leave it."""

    def hf_weights(self) -> NamedWeights:
        """The whole weights under their Hugging Face names. Every rank must exhaust the iterator."""
        ...


class Policy(Trainable[PolicyLoss], Exportable, Protocol):
    """The language model. `infer` gives the log-probabilities of the targets."""

    def step_on_policy(self, minibatch: Sequence[Experience], loss: PolicyLoss) -> tuple[Metrics, list[Tensor]]:
        """`step` by the policy that `old_log_probs` are of, and those: what `infer` would have said before it."""
        ...


class Critic(Trainable[ValueLoss], Protocol):
    """The value function. `infer` gives the values of the states the targets are chosen from."""


class PendingSave(Protocol):
    """This rank's share of a part of a checkpoint, fixed and not yet on disk."""

    def write(self) -> list[Path]:
        """Writes it and flushes it to the disk, in any thread. Returns its files. Raises OSError."""
        ...

    @property
    def summary(self) -> Any:
        """What `finish` needs to know of every rank, once it has written."""
        ...

    def finish(self, summaries: Sequence[Any]) -> None:
        """On rank 0, after every rank has written: whatever describes the whole. Raises OSError."""
        ...


class Stateful(Protocol):
    """A part of a run whose state a checkpoint holds. Every call is collective."""

    def save_state(self, directory: Path, *, copy: bool) -> PendingSave:
        """Fixes the state, to be written into an empty directory that all ranks see.

        copy: in host memory of its own, so that the run may go on; else nothing changes before it is written.
        """
        ...

    def load_state(self, directory: Path) -> None:
        """Takes the state up, whatever the layout of the ranks that saved it."""
        ...


class Reference(Protocol):
    """The policy's past self, from which it is kept from straying far. Every call is collective."""

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """The log-probabilities of the targets, as the policy's."""
        ...

    def refresh(self, step: int) -> None:
        """Becomes the policy as it is before this step, where that is due."""
        ...


OnAnswer: TypeAlias = Callable[[Sequence[Rollout]], None]
"""Gets the siblings of a prompt when all of them are there, where generation happens, in whatever thread."""


class Fleet(Protocol):
    """The inference servers. Called on every rank; every rank gets the same answer."""

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the weights of every server; later rollouts carry `version`."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each prompt, siblings adjacent, in the order of the prompts.

        on_rollout: called once for each finished rollout (progress bars), where generation happens.
        """
        ...


class Grader(Protocol):
    """The verifier. Called on every rank with the same rollouts; every rank gets the same answer."""

    def grade(self, rollouts: Sequence[Rollout], *, on_grade: Callable[[], None] | None = None) -> list[Rollout]:
        """The same rollouts in the same order, each with its `grade`."""
        ...


class DataParallel(Protocol):
    """This rank's share of the data. Ranks with equal `dp_rank` work on the same packs."""

    @property
    def dp_rank(self) -> int: ...

    @property
    def dp_size(self) -> int: ...

    @property
    def pack_multiple(self) -> int:
        """The number of tokens in a pack is a multiple of this."""
        ...

    def dp_all_gather(self, tensor: Tensor) -> Tensor:
        """A small tensor of every data-parallel rank, stacked in their order: [...] -> [dp_size, ...]."""
        ...
