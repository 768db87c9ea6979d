"""Trainer and servers on the same GPUs, in turns: one is asleep while the other works.

    the trainer's turn      infer, step: the servers hold neither weights nor cache
    an update               the servers wake for weights, take them from the trainer; the trainer is offloaded; the
                            servers wake for their cache
    the servers' turn       generate: until the trainer is asked for something

The loop knows nothing of it: its fleet and its models are wrapped. Every call is collective, on every rank alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Literal, Protocol, TypeVar

from torch import Tensor

from megatron_orz.types import (
    Experience,
    Fleet,
    Metrics,
    NamedWeights,
    PackedBatch,
    Policy,
    PolicyLoss,
    Prompt,
    Reference,
    Rollout,
    Trainable,
)

Loss = TypeVar("Loss", contravariant=True)


class SleepingFleet(Fleet, Protocol):
    """A fleet that can give its memory back."""

    def sleep(self) -> None:
        """Gives up the memory of weights and cache. The weights are lost: an update comes next."""
        ...

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Takes the memory of one of them again."""
        ...


class Offloadable(Protocol):
    """A model that can give its memory back."""

    def offload(self) -> Metrics:
        """Moves everything to host memory."""
        ...

    def reload(self) -> None:
        """Brings everything back as it was."""
        ...


class Turns:
    """Whose turn it is. The run begins with the trainer's, its servers asleep."""

    def __init__(self, fleet: SleepingFleet, models: Sequence[Offloadable]) -> None:
        self._fleet = fleet
        self._models = models
        self.is_trainers = True
        self._metrics: Metrics = {}
        self._switch_s = 0.0

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """Around an update: the servers have room for weights inside, and the trainer is offloaded at the end."""
        self.to_trainer()
        with self._timed():
            self._fleet.wake("weights")
        yield
        with self._timed():
            for model in self._models:
                self._metrics |= model.offload()
            self._fleet.wake("kv_cache")
        self.is_trainers = False

    def to_trainer(self) -> None:
        """Puts the servers to sleep and brings the trainer back, unless it is there."""
        if self.is_trainers:
            return
        with self._timed():
            self._fleet.sleep()
            for model in self._models:
                model.reload()
        self.is_trainers = True

    def metrics(self) -> Metrics:
        """What was offloaded last, and the seconds spent on switching since the run began."""
        return self._metrics | {"colocation/switch_s": self._switch_s}

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._switch_s += time.perf_counter() - start


class ColocatedFleet:
    """A Fleet on the trainer's GPUs."""

    def __init__(self, fleet: Fleet, turns: Turns) -> None:
        self._fleet = fleet
        self._turns = turns

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the weights of every server; the servers' turn begins."""
        with self._turns.handing_over():
            self._fleet.update_weights(weights, version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each prompt, siblings adjacent, in the order of the prompts."""
        assert not self._turns.is_trainers, "the servers sleep without weights: an update comes first"
        return self._fleet.generate(prompts, num_responses=num_responses, seed=seed, on_rollout=on_rollout)


class ColocatedModel(Generic[Loss]):
    """A model on the servers' GPUs: whatever is asked of it, its turn comes first."""

    def __init__(self, model: Trainable[Loss], turns: Turns) -> None:
        self._model = model
        self._turns = turns

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """A [T] float32 tensor for each batch, on the CPU."""
        self._turns.to_trainer()
        return self._model.infer(batches)

    def step(self, minibatch: Sequence[Experience], loss: Loss) -> Metrics:
        """One optimizer step on this rank's share of a mini-batch."""
        self._turns.to_trainer()
        return self._model.step(minibatch, loss)


class ColocatedReference:
    """A reference on the servers' GPUs. It follows the policy, and so needs it there for a refresh."""

    def __init__(self, reference: Reference, turns: Turns) -> None:
        self._reference = reference
        self._turns = turns

    def infer(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """A [T] float32 tensor for each batch, on the CPU."""
        self._turns.to_trainer()
        return self._reference.infer(batches)

    def refresh(self, step: int) -> None:
        """Becomes the policy as it is before this step, where that is due."""
        self._turns.to_trainer()
        self._reference.refresh(step)


class ColocatedPolicy(ColocatedModel[PolicyLoss]):
    """A policy on the servers' GPUs."""

    def __init__(self, policy: Policy, turns: Turns) -> None:
        super().__init__(policy, turns)
        self._policy = policy

    def step_on_policy(self, minibatch: Sequence[Experience], loss: PolicyLoss) -> tuple[Metrics, list[Tensor]]:
        """`step`, and the log-probabilities that its forward pass finds."""
        self._turns.to_trainer()
        return self._policy.step_on_policy(minibatch, loss)

    def hf_weights(self) -> NamedWeights:
        """The whole weights under their Hugging Face names."""
        self._turns.to_trainer()
        return self._policy.hf_weights()
