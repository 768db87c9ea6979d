"""Problems that say the same: by their n-grams, and by an encoder's view of them.

Both keep the first of a group, and take problems with other numbers for other problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from rensa import RMinHash, RMinHashLSH

from megatron_orz.data.curation.stage import Advance, Candidate, Verdict
from megatron_orz.data.curation.text import ngrams, numbers, tokens

NUM_HASHES = 256
NUM_BANDS = 32
"""Two problems of Jaccard similarity J meet with probability 1 - (1 - J^8)^32: 0.997 at 0.8, 0.12 at 0.5."""
_ESTIMATE_MARGIN = 0.1
"""Four standard deviations of a similarity of 0.8 estimated from 256 hashes."""
_CHUNK = 2000
_BLOCK = 512
"""Rows of the matrix of similarities that exist at once."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Drops a problem whose n-grams are those of an earlier one. MinHash proposes pairs; what counts is their Jaccard
    similarity itself, |A and B| / |A or B|."""

    ngram: int = 3
    """Tokens in an n-gram."""
    threshold: float = 0.8
    """Least similarity of duplicates."""

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"duplicates.ngram {self.ngram} is not at least 1")
        if not 0.5 <= self.threshold <= 1:
            raise ValueError(f"duplicates.threshold {self.threshold} is outside [0.5, 1]")

    def judge(self, candidates: Sequence[Candidate], advance: Advance) -> list[Verdict]:
        """Reason: `duplicate`, of a problem that is kept."""

        @lru_cache(maxsize=10_000)
        def grams(index: int) -> set[str]:
            words = tokens(candidates[index].text)
            # With their numbers in front, problems that differ in them have no n-gram in common.
            return {f"{numbers(words)}|{gram}" for gram in ngrams(words, self.ngram)}

        index_of_kept = RMinHashLSH(self.threshold, NUM_HASHES, NUM_BANDS)
        signatures: dict[int, RMinHash] = {}
        first_of: dict[int, tuple[int, float]] = {}  # duplicate -> (the one that is kept, similarity)
        for start in range(0, len(candidates), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(candidates)))
            hashes = RMinHash.from_token_sets([sorted(grams(index)) for index in chunk], NUM_HASHES, 0)
            for index, signature in zip(chunk, hashes, strict=True):
                for earlier in sorted(index_of_kept.query(signature)):
                    if signatures[earlier].jaccard(signature) < self.threshold - _ESTIMATE_MARGIN:
                        continue
                    if (similarity := jaccard(grams(earlier), grams(index))) >= self.threshold:
                        first_of[index] = earlier, similarity
                        break
                else:
                    index_of_kept.insert(index, signature)
                    signatures[index] = signature
            advance(len(chunk))
        return _verdicts(candidates, first_of, "duplicate")


@dataclass(frozen=True, kw_only=True)
class Paraphrases:
    """Drops a problem whose embedding is close to that of an earlier one."""

    threshold: float = 0.95
    """Least cosine similarity of duplicates; it depends on the encoder."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"paraphrases.threshold {self.threshold} is outside (0, 1]")

    def judge(
        self,
        candidates: Sequence[Candidate],
        advance: Advance,
        *,
        embed: Callable[[Sequence[Candidate], Advance], torch.Tensor],
    ) -> list[Verdict]:
        """Reason: `paraphrase`, of a problem that is kept. embed: unit vectors [n, H] of n candidates.

        Every pair is compared, a block of rows at a time: 2 n^2 H operations.
        """
        vectors = embed(candidates, advance)
        ids: dict[str, int] = {}
        of_numbers = torch.tensor([ids.setdefault(numbers(tokens(c.text)), len(ids)) for c in candidates])
        first_of: dict[int, tuple[int, float]] = {}
        for start in range(0, len(candidates), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(candidates)))
            similarity = vectors[block] @ vectors[: block.stop].T
            is_pair = (similarity >= self.threshold) & (of_numbers[block, None] == of_numbers[: block.stop])
            # Row by row, so that it is known whether an earlier problem is kept before it is compared with.
            for row, earlier in is_pair.tril(start - 1).nonzero().tolist():
                if start + row not in first_of and earlier not in first_of:
                    first_of[start + row] = earlier, float(similarity[row, earlier])
        return _verdicts(candidates, first_of, "paraphrase")


def jaccard(a: set[str], b: set[str]) -> float:
    """|A and B| / |A or B|."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _verdicts(candidates: Sequence[Candidate], first_of: dict[int, tuple[int, float]], reason: str) -> list[Verdict]:
    num_duplicates = Counter(first for first, _ in first_of.values())
    verdicts = []
    for index, candidate in enumerate(candidates):
        if index in first_of:
            first, similarity = first_of[index]
            kept = candidates[first]
            found = f"of {kept.place}, similarity {similarity:.3f}"
            if candidate.answer != kept.answer:
                found += f"; the answers differ: {candidate.answer!r}, there {kept.answer!r}"
            verdicts.append(Verdict(reason, found))
        else:
            count = num_duplicates[index]
            verdicts.append(Verdict(None, f"stands for {count} more" if count else ""))
    return verdicts
