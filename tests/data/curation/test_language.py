"""The language filter: sentences in other languages go, formulas with few words stay."""

import pytest

from megatron_orz.data.curation.language import Languages
from tests.data.curation.rows import candidates, ignore, published, reasons, texts

FOREIGN = {
    "zh": "求方程 $x^2=4$ 的所有实数解的和是多少",
    "fr": "Combien de nombres premiers sont inférieurs à $100$ ?",
    "de": "Wie viele Primzahlen gibt es unter $100$?",
    "es": "¿Cuántos números primos hay entre $1$ y $100$ y cuál es su suma?",
    "ru": "Найдите сумму всех действительных корней уравнения, которые больше нуля.",
}


def test_other_languages_go() -> None:
    verdicts = Languages().judge(texts(*FOREIGN.values()), ignore)
    assert reasons(verdicts) == ["language"] * len(FOREIGN)


def test_languages_that_are_asked_for_stay() -> None:
    verdicts = Languages(keep=("en", "zh")).judge(texts(*FOREIGN.values()), ignore)
    assert [reason for reason in reasons(verdicts) if reason is None] == [None]
    assert reasons(verdicts)[list(FOREIGN).index("zh")] is None
    assert reasons(Languages(keep=()).judge(texts(*FOREIGN.values()), ignore)) == [None] * len(FOREIGN)


def test_formulas_with_few_words_stay() -> None:
    few = texts("Compute $\\dbinom{31}{28}$.", "9-6+4+8", "Find $x$.", "$$x^2=4$$", "Evaluate $\\lceil 3.6\\rceil$.")
    assert reasons(Languages().judge(few, ignore)) == [None] * len(few)


def test_english_that_resembles_its_relatives_stays() -> None:
    """The most likely language of this problem of GSM8K is a creole, and English the next."""
    text = "198 passengers fit into 9 buses. How many passengers fit in 5 buses?"
    [verdict] = Languages().judge(texts(text), ignore)
    assert verdict.reason is None
    assert not verdict.detail.startswith("en")


@pytest.mark.parametrize("name", ["math500.json", "aime2024.json", "gsm8k_test.jsonl"])
def test_published_sets_are_english(name: str) -> None:
    assert set(reasons(Languages().judge(candidates(published(name)), ignore))) == {None}


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"languages.keep holds english; use ISO 639-1 codes"):
        Languages(keep=("english",))
