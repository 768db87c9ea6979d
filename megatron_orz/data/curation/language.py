"""The language a problem is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from megatron_orz.data.curation.stage import Advance, Candidate, Verdict
from megatron_orz.data.curation.text import prose

_NEGLIGIBLE = 0.1


@dataclass(frozen=True, kw_only=True)
class Languages:
    """Drops problems in other languages. Training on English alone is the more stable in the recipe's ablation."""

    keep: tuple[str, ...] = ("en",)
    """ISO 639-1 codes of the languages to keep; none keeps all."""
    min_probability: float = 0.5
    """A problem goes only where another language is at least this likely: formulas with few words have none."""

    def __post_init__(self) -> None:
        if not 0 < self.min_probability < 1:
            raise ValueError(f"languages.min_probability {self.min_probability} is outside (0, 1)")
        if unknown := set(self.keep) - set(_identifier().labels):
            raise ValueError(f"languages.keep holds {', '.join(sorted(unknown))}; use ISO 639-1 codes such as en, zh")

    def judge(self, candidates: Sequence[Candidate], advance: Advance) -> list[Verdict]:
        """Reason: `language`."""
        identifier = _identifier()
        verdicts = []
        for candidate in candidates:
            ranking = identifier.rank(prose(candidate.text))
            language, probability = ranking[0]
            is_sure = probability >= self.min_probability
            share_kept = sum(share for name, share in ranking if name in self.keep)
            # Close relatives share a text's probability: of English, the creoles.
            is_other = is_sure and bool(self.keep) and share_kept < _NEGLIGIBLE
            found = f"{language} with probability {probability:.2f}" if is_sure else "too few words to tell"
            verdicts.append(Verdict("language" if is_other else None, found))
            advance(1)
        return verdicts


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
