"""Rollouts between trainer ranks, and in checkpoints: flat arrays, without the prompts, which every rank has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from megatron_orz.types import FinishReason, Prompt, Rollout, Swap

_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutArrays:
    """Rollouts laid end to end."""

    token_ids: NDArray[numpy.int32]  # [response tokens of all rollouts]
    log_probs: NDArray[numpy.float32]  # likewise; servers compute them in float32, so nothing is lost
    ends: NDArray[numpy.int64]  # [rollouts], where each response ends in the two arrays above
    finish_reasons: NDArray[numpy.uint8]  # [rollouts]
    versions: NDArray[numpy.int64]  # [rollouts], of the first tokens
    swaps: NDArray[numpy.int64]  # [swaps, 3]: rollout, token, version

    @classmethod
    def pack(cls, rollouts: Sequence[Rollout]) -> Self:
        """The arrays of a list of rollouts."""
        return cls(
            token_ids=numpy.fromiter(chain.from_iterable(r.response_ids for r in rollouts), numpy.int32),
            log_probs=numpy.fromiter(chain.from_iterable(r.rollout_log_probs for r in rollouts), numpy.float32),
            ends=numpy.cumsum([len(r.response_ids) for r in rollouts], dtype=numpy.int64),
            finish_reasons=numpy.array([_FINISH_REASONS.index(r.finish_reason) for r in rollouts], numpy.uint8),
            versions=numpy.array([r.policy_version for r in rollouts], numpy.int64),
            swaps=numpy.array(
                [(index, *swap) for index, r in enumerate(rollouts) for swap in r.swaps], numpy.int64
            ).reshape(-1, 3),
        )

    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def unpack(self, prompts: Sequence[Prompt], *, num_responses: int) -> list[Rollout]:
        """The rollouts that were packed: `num_responses` for each prompt, siblings adjacent."""
        swaps: defaultdict[int, list[Swap]] = defaultdict(list)
        for index, token, version in self.swaps.tolist():
            swaps[index].append(Swap(token, version))
        rollouts = []
        begin = 0
        columns = zip(self.ends.tolist(), self.finish_reasons.tolist(), self.versions.tolist(), strict=True)
        for index, (end, reason, version) in enumerate(columns):
            rollouts.append(
                Rollout(
                    prompt=prompts[index // num_responses],
                    response_ids=self.token_ids[begin:end].tolist(),
                    rollout_log_probs=self.log_probs[begin:end].tolist(),
                    finish_reason=_FINISH_REASONS[reason],
                    policy_version=version,
                    swaps=tuple(swaps.get(index, ())),
                )
            )
            begin = end
        return rollouts
