"""How much of a response was there before.

The score of a response of n tokens is the share of its n (n + 1) / 2 stretches that begin earlier in it, too:

    repetition = 2 sum_t lpf_t / (n (n + 1)) = 1 - distinct stretches / all stretches

lpf_t counts the stretches from t on that began before (`ops/repetition.py`): every stretch is new where it begins
first, and nowhere else. 0: no token occurs twice; a loop over the last part p of a response: about p^2. The original's
score is the same over the characters of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_orz.ops.repetition import longest_previous_factor

NUM_TOGETHER = 512
"""Responses looked at together: enough for all cores, few enough that their tokens take little memory."""


def repetition_scores(responses: Sequence[Sequence[int]]) -> list[float]:
    """The score of each response, from its token ids; 0 for an empty one."""
    scores: list[float] = []
    for first in range(0, len(responses), NUM_TOGETHER):
        together = responses[first : first + NUM_TOGETHER]
        cu_seqlens = torch.tensor(list(accumulate(map(len, together), initial=0)), dtype=torch.int32)
        tokens = np.fromiter(chain.from_iterable(together), dtype=np.int64, count=int(cu_seqlens[-1]))
        factors = longest_previous_factor(torch.from_numpy(tokens), cu_seqlens)
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), factors.cumsum(0)])[cu_seqlens.long()].diff()
        lengths = cu_seqlens.diff().double()
        scores += (2 * sums / (lengths * (lengths + 1)).clamp(min=1)).tolist()
    return scores


def repeated_tokens(response: Sequence[int], *, min_tokens: int) -> NDArray[np.bool_]:
    """Which tokens lie in a stretch of at least `min_tokens` that also begins earlier in the response: [n]."""
    tokens = torch.tensor(response, dtype=torch.int64)
    factors = longest_previous_factor(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
    return _covered(factors, min_tokens).numpy()


def _covered(factors: Tensor, min_tokens: int) -> Tensor:
    """[n] bool: the tokens that the stretches of at least `min_tokens`, from each token on, reach."""
    positions = torch.arange(len(factors))
    if not len(factors):
        return positions.bool()
    ends = torch.where(factors >= min_tokens, positions + factors, 0)
    return positions < ends.cummax(0).values
