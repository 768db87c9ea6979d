"""Answers to some of the prompts of a step, out to a checkpoint and in again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy

from megatron_orz.rollout_arrays import RolloutArrays
from megatron_orz.types import Prompt, Rollout

Answers: TypeAlias = dict[int, list[Rollout]]
"""The siblings of a prompt, by its place among those of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a step asks for."""

    prompts: list[Prompt]
    num_responses: int
    seed: int


class PendingAnswers:
    """The answers that a checkpoint is about to hold, a file for each step that has any: see `PendingSave`."""

    summary = None

    def __init__(self, directory: Path, batches: Sequence[tuple[Order, Mapping[int, list[Rollout]]]]) -> None:
        self._directory = directory
        self._batches = batches

    def write(self) -> list[Path]:
        """Writes and flushes them."""
        return [
            SavedAnswers.of_answers(order, answers).write(self._directory / f"{order.seed}.npz")
            for order, answers in self._batches
        ]

    def finish(self, summaries: Sequence[Any]) -> None:
        """There is nothing to describe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedAnswers:
    """Answers to some of the prompts of a step, without the prompts themselves."""

    places: list[int]
    prompt_ids: list[int]
    num_responses: int
    rollouts: RolloutArrays

    @classmethod
    def of_answers(cls, order: Order, answers: Mapping[int, list[Rollout]]) -> SavedAnswers:
        """The answers to an order."""
        return cls(
            places=list(answers),
            prompt_ids=[order.prompts[place].prompt_id for place in answers],
            num_responses=order.num_responses,
            rollouts=RolloutArrays.pack(list(chain.from_iterable(answers.values()))),
        )

    @classmethod
    def read(cls, path: Path) -> SavedAnswers:
        """What `write` has written."""
        with numpy.load(path, allow_pickle=False) as arrays:
            columns = dict(arrays)
        places, prompt_ids = columns.pop("places").tolist(), columns.pop("prompt_ids").tolist()
        num_responses = int(columns.pop("num_responses"))
        return cls(places=places, prompt_ids=prompt_ids, num_responses=num_responses, rollouts=RolloutArrays(**columns))

    def write(self, path: Path) -> Path:
        """Writes the file, flushed to the disk. Raises OSError."""
        arrays: dict[str, Any] = {
            "places": numpy.array(self.places),
            "prompt_ids": numpy.array(self.prompt_ids),
            "num_responses": numpy.array(self.num_responses),
            **self.rollouts.columns(),
        }
        with path.open("wb") as file:
            numpy.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        return path

    def of(self, order: Order) -> Answers:
        """The answers to an order. Raises ValueError when they are to other prompts."""
        prompts = [order.prompts[place] for place in self.places if place < len(order.prompts)]
        if self.num_responses != order.num_responses or self.prompt_ids != [prompt.prompt_id for prompt in prompts]:
            raise ValueError(
                "the checkpoint holds rollouts of other prompts than those of the next step; go on with the data and "
                "the seed it was saved with, or begin anew with --fresh"
            )
        rollouts = self.rollouts.unpack(prompts, num_responses=order.num_responses)
        size = order.num_responses
        return {place: rollouts[index * size : (index + 1) * size] for index, place in enumerate(self.places)}
