"""Rollouts on the wire between trainer ranks: a few flat arrays, without the prompts, which every rank has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from megatron_orz.rollout.ranks import Ranks
from megatron_orz.types import FinishReason, Prompt, Rollout

_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


def share_rollouts(
    ranks: Ranks,
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    *,
    num_responses: int,
    version: int,
    source: int,
) -> list[Rollout]:
    """The rollouts of rank `source`, on every rank; the other ranks' `rollouts` are ignored.

    prompts: those the rollouts answer, siblings adjacent, the same list on all ranks.
    """
    if ranks.rank == source and ranks.size == 1:
        return list(rollouts)
    num_rollouts = len(prompts) * num_responses
    if ranks.rank != source:
        rollouts = ()
    lengths = _filled((len(rollout.response_ids) for rollout in rollouts), num_rollouts, torch.int64)
    lengths = ranks.broadcast(lengths, source=source)
    num_tokens = int(lengths.sum())
    reasons = _filled((_FINISH_REASONS.index(r.finish_reason) for r in rollouts), num_rollouts, torch.uint8)
    token_ids = _filled(chain.from_iterable(r.response_ids for r in rollouts), num_tokens, torch.int32)
    log_probs = _filled(chain.from_iterable(r.rollout_log_probs for r in rollouts), num_tokens, torch.float32)
    for array in (reasons, token_ids, log_probs):
        ranks.broadcast(array, source=source)
    if ranks.rank == source:
        return list(rollouts)
    return [
        Rollout(
            prompt=prompts[index // num_responses],
            response_ids=ids.tolist(),
            rollout_log_probs=log_probs_of_ids.tolist(),
            finish_reason=_FINISH_REASONS[reason],
            policy_version=version,
        )
        for index, (ids, log_probs_of_ids, reason) in enumerate(
            zip(
                token_ids.split(lengths.tolist()),
                log_probs.split(lengths.tolist()),
                reasons.tolist(),
                strict=True,
            )
        )
    ]
