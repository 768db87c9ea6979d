"""Proof that the servers hold what was sent: digests of both, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from megatron_orz.config import Verification
from megatron_orz.rollout.digests import Block, as_matrix, digest, total
from megatron_orz.rollout.servers import ServerError
from megatron_orz.types import NamedWeights

SAMPLING_PERIOD = 16
"""After the first update, each one verifies every sixteenth tensor, beginning with another one each time."""

Digests: TypeAlias = Mapping[str, Sequence[int]]
"""Of tensors by name: digest, number of elements."""


class WeightMismatch(ServerError):
    """A server holds other weights than those it was sent."""


class SentDigests:
    """The digests of one update's tensors, taken before they enter a transport.

    num_updates: how many updates the servers have had before; the first is verified whole.
    dtype: what floating-point tensors are converted to on the way.
    """

    def __init__(self, verification: Verification, *, num_updates: int, dtype: torch.dtype | None) -> None:
        self._period = {"off": 0, "full": 1, "sampled": SAMPLING_PERIOD if num_updates else 1}[verification]
        self._phase = num_updates
        self._dtype = dtype
        self.sent: dict[str, tuple[int, int]] = {}
        """Digest and number of elements of the tensors to verify."""

    def watch(self, weights: NamedWeights) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the weights on, and takes digests."""
        for index, (name, weight) in enumerate(weights):
            if self._period and weight.is_floating_point() and (index - self._phase) % self._period == 0:
                self.sent[name] = (digest(as_matrix(weight.detach().to(self._dtype or weight.dtype))), weight.numel())
            yield name, weight


def compare(sent: Digests, workers: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]], url: str) -> None:
    """Compares what was sent with the answers of a server's workers to `weight_digests`.

    A tensor may lie in pieces on several workers, and in several places: copies of a block must agree, and the
    distinct blocks must make up the whole. Raises WeightMismatch with the names of the tensors.
    """
    wrong = {}
    for name, (whole, numel) in sent.items():
        reason = _difference([part for worker in workers for part in worker[name]], whole, numel)
        if reason is not None:
            wrong[name] = reason
    if wrong:
        few = "; ".join(f"{name}: {reason}" for name, reason in list(wrong.items())[:5])
        raise WeightMismatch(
            f"the server at {url} does not hold the weights it was sent: {len(wrong)} of {len(sent)} "
            f"verified tensors differ ({few}); restart the run"
        )


def _difference(parts: Sequence[Mapping[str, Any]], sent: int, numel: int) -> str | None:
    """In what a tensor differs from what was sent; None if it does not."""
    digests: dict[Block, int] = {}
    for part in parts:
        block = Block(*part["block"])
        is_whole = block.numel == numel
        if digests.setdefault(block, part["digest"]) != part["digest"] or (is_whole and part["digest"] != sent):
            return f"other values in {part['place']}"
    num_held = sum(block.numel for block in digests)
    if num_held != numel:
        return f"{num_held} of its {numel} elements are held"
    if total(list(digests.values())) != sent:
        return f"other values in {', '.join(sorted({part['place'] for part in parts}))}"
    return None
