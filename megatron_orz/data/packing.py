"""Laying sequences end to end: which rank, which pack, and the tensors of a pack.

The plan works on lengths alone and is a pure function of them, so that every rank computes the same one
without talking to the others:

    1. rollouts -> ranks    longest first, each to the rank with the fewest tokens so far
    2. a rank's -> packs    best-fit decreasing within the token budget
    3. ranks <-> ranks      the same number of packs everywhere; where packs are to spare, the tokens of a
                            rank are spread evenly, and only a rank without enough sequences runs empty packs
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch

from megatron_orz.types import Demonstration, PackedBatch, Rollout

Item = TypeVar("Item")
Pack = list[int]
"""Indices of the sequences in a pack."""


def pack(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float] | None = None,
    *,
    max_pack_tokens: int,
    dp_size: int = 1,
    dp_rank: int = 0,
    min_packs: int = 1,
    pad_multiple: int = 1,
    seed: int = 0,
) -> list[PackedBatch]:
    """The packs of one data-parallel rank. Every rank calls it with all rollouts and gets as many packs.

    rewards: what each rollout is credited with at its last token; by default its grade's reward.
    min_packs: at least this many packs per rank, for an optimizer that takes as many mini-batches.
    pad_multiple: T of every pack becomes a multiple of it by one more sequence, which no loss looks at.
    seed: shuffles the packs.

    Raises ValueError for a rollout without a prompt, a response or a grade, and for one longer than a pack.
    """
    for rollout in rollouts:
        if rollout.grade is None:
            raise ValueError(f"a rollout of prompt {rollout.prompt.prompt_id} is not graded; grade before packing")
        if len(rollout.rollout_log_probs) != len(rollout.response_ids):
            raise ValueError(
                f"a rollout of prompt {rollout.prompt.prompt_id} has {len(rollout.response_ids)} response tokens "
                f"and {len(rollout.rollout_log_probs)} log-probabilities; the fleet must return one for each"
            )
    if rewards is None:
        rewards = [rollout.grade.reward if rollout.grade else 0.0 for rollout in rollouts]
    sequences = [
        _Sequence(
            prompt_ids=rollout.prompt.token_ids,
            response_ids=rollout.response_ids,
            loss_mask=True,
            reward=reward,
            log_probs=rollout.rollout_log_probs,
        )
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    return _pack(sequences, max_pack_tokens, dp_size, dp_rank, min_packs, pad_multiple, seed)


def pack_demonstrations(
    demonstrations: Iterable[Demonstration],
    *,
    max_pack_tokens: int,
    dp_size: int = 1,
    dp_rank: int = 0,
    pad_multiple: int = 1,
    seed: int = 0,
) -> list[PackedBatch]:
    """`pack` for supervised training: the first token of a demonstration is its prompt."""
    examples = [
        _Sequence(
            prompt_ids=demonstration.token_ids[:1],
            response_ids=demonstration.token_ids[1:],
            loss_mask=demonstration.loss_mask[1:],
        )
        for demonstration in demonstrations
    ]
    return _pack(examples, max_pack_tokens, dp_size, dp_rank, min_packs=1, pad_multiple=pad_multiple, seed=seed)


def split(items: Sequence[Item], num_parts: int) -> list[list[Item]]:
    """Contiguous parts, in order, whose sizes differ by at most one. Raises ValueError when one would be empty."""
    if not 1 <= num_parts <= len(items):
        raise ValueError(f"{len(items)} packs cannot be split into {num_parts} mini-batches; pack with min_packs")
    bounds = [len(items) * part // num_parts for part in range(num_parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(bounds)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sequence:
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    loss_mask: Sequence[bool] | bool
    """Of the response."""
    reward: float = 0.0
    log_probs: Sequence[float] | float = 0.0

    @property
    def num_tokens(self) -> int:
        """Positions in a pack: the last token is a target only."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def _pack(
    sequences: Sequence[_Sequence],
    max_pack_tokens: int,
    dp_size: int,
    dp_rank: int,
    min_packs: int,
    pad_multiple: int,
    seed: int,
) -> list[PackedBatch]:
    for index, sequence in enumerate(sequences):
        if not sequence.prompt_ids or not sequence.response_ids:
            raise ValueError(
                f"sequence {index} has {len(sequence.prompt_ids)} prompt and {len(sequence.response_ids)} response "
                "tokens; both must be at least 1, drop it before packing"
            )
    # Padding must not push a full pack over the budget.
    budget = max_pack_tokens // pad_multiple * pad_multiple
    plan = plan_packs(
        [sequence.num_tokens for sequence in sequences],
        max_pack_tokens=budget,
        dp_size=dp_size,
        min_packs=min_packs,
        seed=seed,
    )
    return [_lay_out([sequences[index] for index in pack], pad_multiple) for pack in plan[dp_rank]]


def plan_packs(
    lengths: Sequence[int], *, max_pack_tokens: int, dp_size: int = 1, min_packs: int = 1, seed: int = 0
) -> list[list[Pack]]:
    """For every rank its packs, each a list of indices into `lengths`; the same number of packs on every rank."""
    longest = max(lengths, default=0)
    if longest > max_pack_tokens:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the budget of a pack, {max_pack_tokens} tokens; "
            "raise data.max_pack_tokens"
        )
    ranks = _spread(range(len(lengths)), lengths, dp_size)
    tightest = [_best_fit(rank, lengths, max_pack_tokens) for rank in ranks]
    num_packs = max(min_packs, *map(len, tightest))

    plan = []
    for rank, packs in zip(ranks, tightest, strict=True):
        even = _spread(rank, lengths, num_packs)
        fits = all(sum(lengths[index] for index in pack) <= max_pack_tokens for pack in even)
        plan.append(even if fits else _divide(packs, num_packs))
    return _shuffle(plan, seed)


def _spread(indices: Iterable[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Longest first, each to the bin with the fewest tokens so far."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for index in sorted(indices, key=lambda index: -lengths[index]):
        load, number = loads[0]
        bins[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return bins


def _best_fit(indices: Iterable[int], lengths: Sequence[int], capacity: int) -> list[Pack]:
    """Longest first, each to the fullest pack it still fits in."""
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for index in sorted(indices, key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(index)
        insort(rooms, (room - length, number))
    return packs


def _divide(packs: Sequence[Pack], num_packs: int) -> list[Pack]:
    """As many packs, of which those to spare get a sequence each from the packs that hold most of them."""
    divided = [list(pack) for pack in packs]
    while len(divided) < num_packs:
        divided.append([max(divided, key=len).pop()])
    return divided


def _shuffle(plan: list[list[Pack]], seed: int) -> list[list[Pack]]:
    """Packs in random order, yet with the empty ones of different ranks in different places.

    The ranks step through their packs together. Each rank's filled packs begin where the last rank's ended,
    so no mini-batch is empty on all ranks as long as there are as many filled packs as places.
    """
    rng = random.Random(seed)
    num_packs = len(plan[0])
    places = list(range(num_packs))
    rng.shuffle(places)
    shuffled: list[list[Pack]] = []
    offset = 0
    for packs in plan:
        filled = [pack for pack in packs if pack]
        rng.shuffle(filled)
        row: list[Pack] = [[] for _ in range(num_packs)]
        for number, pack in enumerate(filled, start=offset):
            row[places[number % num_packs]] = pack
        shuffled.append(row)
        offset += len(filled)
    return shuffled


def _lay_out(sequences: Sequence[_Sequence], pad_multiple: int) -> PackedBatch:
    lengths = [sequence.num_tokens for sequence in sequences]
    num_tokens = sum(lengths)
    padding = pad_multiple if num_tokens == 0 else -num_tokens % pad_multiple
    if padding:
        lengths.append(padding)
    ends = np.cumsum(lengths, dtype=np.int32)
    size = int(ends[-1])

    tokens, targets = np.zeros(size, np.int64), np.zeros(size, np.int64)
    loss_mask = np.zeros(size, np.bool_)
    rewards, log_probs = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for end, length, sequence in zip(ends, lengths, sequences, strict=False):  # not over the padding
        start, response = end - length, end - len(sequence.response_ids)
        token_ids = np.fromiter(chain(sequence.prompt_ids, sequence.response_ids), np.int64, length + 1)
        tokens[start:end], targets[start:end] = token_ids[:-1], token_ids[1:]
        loss_mask[response:end] = sequence.loss_mask
        rewards[end - 1] = sequence.reward
        log_probs[response:end] = sequence.log_probs

    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(np.concatenate([np.zeros(1, np.int32), ends])),
        max_seqlen=max(lengths),
        loss_mask=torch.from_numpy(loss_mask),
        rewards=torch.from_numpy(rewards),
        rollout_log_probs=torch.from_numpy(log_probs),
    )
