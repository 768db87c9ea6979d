"""From the records of a benchmark to its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_orz.evaluation.records import ItemRecord, ResponseRecord
from megatron_orz.evaluation.scores import Estimate, estimate, majority_score, pass_at_k, powers_of_two


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The scores of one benchmark, and what its responses were like."""

    name: str
    num_items: int
    num_responses: int
    """Responses to each item."""
    scores: dict[str, Estimate]
    """`avg@k`, which is also pass@1, then `pass@2`, ... and `maj@k`."""
    format_share: float
    truncated_share: float
    timed_out: int
    length_mean: float
    """Tokens of a response."""


def summarise(name: str, records: Sequence[ItemRecord]) -> Summary:
    """The scores of the records, of which every item has equally many responses.

    A response counts as right when it is right and finished, as in training. Programs are not put to the vote.
    """
    num_responses = len(records[0].responses)
    if any(len(record.responses) != num_responses for record in records):
        raise ValueError(f"the items of {name} have different numbers of responses; evaluate into an empty directory")
    num_right = [sum(response.reward > 0 for response in record.responses) for record in records]
    scores = {f"avg@{num_responses}": estimate([record.score for record in records])}
    for k in powers_of_two(num_responses):
        scores[f"pass@{k}"] = estimate([pass_at_k(num_responses, right, k) for right in num_right])
    if all(record.kind != "code" for record in records):
        scores[f"maj@{num_responses}"] = estimate([_majority(record.responses) for record in records])
    responses = [response for record in records for response in record.responses]
    return Summary(
        name=name,
        num_items=len(records),
        num_responses=num_responses,
        scores=scores,
        format_share=fmean(response.is_formatted for response in responses),
        truncated_share=fmean(response.finish_reason != "stop" for response in responses),
        timed_out=sum(response.timed_out for response in responses),
        length_mean=fmean(response.num_tokens for response in responses),
    )


def _majority(responses: Sequence[ResponseRecord]) -> float:
    return majority_score([response.vote for response in responses], [response.is_correct for response in responses])
