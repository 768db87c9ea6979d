"""Does the critic devalue repetition? Repeated tokens against all others, with bootstrap intervals.

A mean over repeated tokens and one over the others differ for reasons that are no repetition: loops come late, and in
responses that fail. So each difference is given twice, as it is, and matched: taken within strata, tokens of the same
outcome in the same tenth of their response, and averaged over the strata as repeated tokens are spread over them:

    matched = sum_s w_s (mean_repeated_s - mean_other_s),  w_s ~ repeated tokens in s, over strata that hold both

Of a value itself, strata cannot tell repetition from what else a response is; its change from token to token can.
Intervals come from the percentile bootstrap over prompts (Efron 1979): tokens of a response are no independent draws,
nor are responses to one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_orz.critic_analysis.values import ValuedResponse

Floats = NDArray[np.float64]
NUM_TENTHS = 10
NUM_STRATA = 2 * NUM_TENTHS
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with its bootstrap interval; nan where there is nothing to estimate it from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """One quantity of tokens, in repeated stretches and elsewhere."""

    name: str
    num_repeated: int
    num_other: int
    repeated: float
    other: float
    difference: Estimate
    matched: Estimate


QUANTITIES: dict[str, Callable[[ValuedResponse], NDArray[np.float32]]] = {
    # The change over the last token is the reward's, not the critic's.
    "value change V(s_t+1) - V(s_t)": lambda response: np.diff(response.values),
    "value V(s_t)": lambda response: response.values,
    "advantage A_t": lambda response: response.advantages,
}
"""What is compared; element i of each is of token i."""


def contrasts(responses: Sequence[ValuedResponse], *, num_resamples: int, seed: int) -> list[Contrast]:
    """Every quantity in repeated stretches against elsewhere; the same seed gives the same intervals.

    One prompt alone has none. Raises ValueError for no responses.
    """
    prompt_ids = sorted({response.generation.prompt_id for response in responses})
    num_prompts = len(prompt_ids)
    if not num_prompts:
        raise ValueError("there is no response to analyse; give generations that hold at least one token")
    draws = np.random.default_rng(seed).multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples if num_prompts > 1 else 0
    )  # [num_resamples, prompts]
    row_of = {prompt_id: row for row, prompt_id in enumerate(prompt_ids)}
    return [_contrast(name, quantity, responses, row_of, draws) for name, quantity in QUANTITIES.items()]


def _contrast(
    name: str,
    quantity: Callable[[ValuedResponse], NDArray[np.float32]],
    responses: Sequence[ValuedResponse],
    row_of: dict[int, int],
    draws: NDArray[np.int64],
) -> Contrast:
    sums = np.zeros((2, len(row_of), NUM_STRATA, 2))  # (count, sum), prompt, stratum, (other, repeated)
    for response in responses:
        x = quantity(response).astype(np.float64)
        cell = 2 * _strata(response)[: len(x)] + response.is_repeated[: len(x)]
        of_response = [np.bincount(cell, weights, minlength=2 * NUM_STRATA) for weights in (None, x)]
        sums[:, row_of[response.generation.prompt_id]] += np.reshape(of_response, (2, NUM_STRATA, 2))
    whole = sums.sum(axis=1)
    resampled = np.einsum("rp,kpsc->krsc", draws, sums, optimize=True)
    (other, repeated), (num_other, num_repeated) = _means(*whole), whole[0].sum(axis=0)
    return Contrast(
        name=name,
        num_repeated=int(num_repeated),
        num_other=int(num_other),
        repeated=float(repeated),
        other=float(other),
        difference=_estimate(_difference, whole, resampled),
        matched=_estimate(_matched_difference, whole, resampled),
    )


def _strata(response: ValuedResponse) -> NDArray[np.int64]:
    """Of each token, [n]: its tenth of the response, apart for right and wrong ones."""
    n = len(response.values)
    return np.arange(n) * NUM_TENTHS // n + NUM_TENTHS * response.generation.is_correct


def _means(counts: Floats, sums: Floats) -> Floats:
    """[..., strata, 2] to [..., 2]."""
    with np.errstate(invalid="ignore"):
        return sums.sum(axis=-2) / counts.sum(axis=-2)


def _difference(counts: Floats, sums: Floats) -> Floats:
    means = _means(counts, sums)
    return means[..., 1] - means[..., 0]


def _matched_difference(counts: Floats, sums: Floats) -> Floats:
    weights = np.where(counts.min(axis=-1) > 0, counts[..., 1], 0.0)  # [..., strata]
    means = sums / np.maximum(counts, 1)
    with np.errstate(invalid="ignore"):
        return (weights * (means[..., 1] - means[..., 0])).sum(axis=-1) / weights.sum(axis=-1)


def _estimate(statistic: Callable[[Floats, Floats], Floats], whole: Floats, resampled: Floats) -> Estimate:
    resamples = statistic(*resampled)
    resamples = resamples[~np.isnan(resamples)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resamples, [tail, 1 - tail]) if len(resamples) else (np.nan, np.nan)
    return Estimate(value=float(statistic(*whole)), low=float(low), high=float(high))
