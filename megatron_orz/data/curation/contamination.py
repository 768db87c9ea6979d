"""Training problems that stand in an evaluation set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_orz.data.curation.stage import Advance, Candidate, Verdict
from megatron_orz.data.curation.text import ngrams, tokens
from megatron_orz.data.reading import Problem


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """Drops a problem that holds a good part of the n-grams of an evaluation problem, wherever they stand in it."""

    ngram: int = 8
    """Tokens in an n-gram."""
    max_overlap: float = 0.5
    """A problem goes where it holds more than this share of an evaluation problem's n-grams."""

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"decontamination.ngram {self.ngram} is not at least 1")
        if not 0 <= self.max_overlap < 1:
            raise ValueError(f"decontamination.max_overlap {self.max_overlap} is outside [0, 1)")

    def judge(
        self, candidates: Sequence[Candidate], advance: Advance, *, evaluation: Sequence[Problem]
    ) -> list[Verdict]:
        """Reason: `contaminated`. A problem of fewer than n tokens is one n-gram, which its copies alone hold."""
        holders: defaultdict[str, list[int]] = defaultdict(list)  # n-gram -> the evaluation problems that hold it
        sizes: list[int] = []
        for index, problem in enumerate(evaluation):
            grams = ngrams(tokens(problem.text), self.ngram)
            sizes.append(len(grams))
            for gram in grams:
                holders[gram].append(index)

        verdicts = []
        for candidate in candidates:
            grams = ngrams(tokens(candidate.text), self.ngram)
            hits = Counter(index for gram in grams for index in holders.get(gram, ()))
            overlap, index = max(((count / sizes[index], -index) for index, count in hits.items()), default=(0.0, 0))
            found = f"{overlap:.2f} of the {self.ngram}-grams of {evaluation[-index].place}" if overlap else ""
            verdicts.append(Verdict("contaminated" if overlap > self.max_overlap else None, found))
            advance(1)
        return verdicts
