"""Near-duplicates by n-grams, against comparing every pair; paraphrases by embeddings, against the same."""

import random
from functools import cache
from itertools import combinations

import pytest
import torch

from megatron_orz.data.curation.duplicates import Duplicates, Paraphrases, jaccard
from megatron_orz.data.curation.stage import Candidate
from megatron_orz.data.curation.text import ngrams, numbers, tokens
from tests.data.curation.rows import candidates, ignore, published, reasons, texts


@cache
def parts(text: str) -> tuple[list[str], set[tuple[str, ...]]]:
    """Numbers and 3-grams."""
    words = tokens(text)
    return sorted(w for w in words if w[0].isdigit()), {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def exact_similarity(a: str, b: str) -> float:
    """Jaccard similarity of the 3-grams by its definition; 0 for problems with other numbers."""
    (numbers_a, first), (numbers_b, second) = parts(a), parts(b)
    return len(first & second) / len(first | second) if numbers_a == numbers_b else 0.0


def edited(text: str, rng: random.Random, num_edits: int) -> str:
    """The text with some words that are no numbers replaced, dropped or doubled."""
    words = text.split(" ")
    for _ in range(num_edits):
        place = rng.randrange(len(words))
        if not any(character.isdigit() for character in words[place]):
            words[place : place + 1] = rng.choice([["thing"], [], [words[place]] * 2])
    return " ".join(words)


def test_duplicates_equal_those_of_comparing_every_pair() -> None:
    """300 problems of GSM8K and 300 edited copies: recall above 0.98 of all pairs at 0.8, precision 1.

    A pair of similarity 0.8 is proposed with probability 0.997, a closer one with a higher; the estimate that
    it must pass then is four standard deviations lower.
    """
    rng = random.Random(0)
    originals = [problem.text for problem in published("gsm8k_train.jsonl")[:300]]
    copies = [edited(text, rng, num_edits) for num_edits in (1, 1, 2, 2, 3, 4) for text in originals[:50]]
    everything = originals + copies
    rng.shuffle(everything)
    rows = texts(*everything)
    verdicts = Duplicates().judge(rows, ignore)

    kept: list[Candidate] = []
    expected = []
    for row in rows:  # the definition: the first of each group stays
        is_duplicate = any(exact_similarity(row.text, first.text) >= 0.8 for first in kept)
        expected.append(is_duplicate)
        if not is_duplicate:
            kept.append(row)
    found = [verdict.reason == "duplicate" for verdict in verdicts]
    num_right = sum(is_found and is_expected for is_found, is_expected in zip(found, expected, strict=True))
    assert 100 < sum(expected) < 250, "the copies span the threshold"
    assert num_right / sum(expected) > 0.98
    assert num_right == sum(found)


def test_every_duplicate_names_the_one_that_stays_and_how_similar_it_is() -> None:
    rows = candidates(
        [
            ("Tom has 3 red apples and buys 4 more green apples. How many apples has he?", "7"),
            ("Ann walks 5 miles. How far is it back?", "5"),
            ("Tom has $3$ red apples and buys $4$ more green apples.  How many APPLES has he?", "7"),
            ("Tom has 3 red apples and buys 4 more green apples. How many apples has he?", "12"),
        ]
    )
    first, other, same, conflict = Duplicates().judge(rows, ignore)
    assert (first.reason, first.detail) == (None, "stands for 2 more")
    assert (other.reason, other.detail) == (None, "")
    assert (same.reason, same.detail) == ("duplicate", "of x.jsonl: line 1, similarity 1.000")
    assert conflict.detail.endswith("similarity 1.000; the answers differ: '12', there '7'")


def test_problems_with_other_numbers_are_other_problems() -> None:
    text = "A train travels {} miles in {} hours. At the same rate, how far does it travel in another hour?"
    rows = texts(
        text.format(270, 3), text.format(360, 3), text.format("1,270", 3), text.format("1270", 3), "9-6", "6-9"
    )
    assert reasons(Duplicates(threshold=0.5).judge(rows, ignore)) == [None, None, None, "duplicate", None, None]


def test_unrelated_problems_of_published_sets_stay() -> None:
    rows = candidates(published("math500.json") + published("aime2024.json"))
    assert set(reasons(Duplicates().judge(rows, ignore))) == {None}
    closest = max(exact_similarity(a.text, b.text) for a, b in combinations(rows[:200], 2))
    assert closest < 0.8


@pytest.mark.parametrize("text", ["", " ", "?", "1", "x" * 100_000, "日本語のテキスト", "\x00\x01", "$$$$"])
def test_odd_texts_are_duplicates_of_themselves_alone(text: str) -> None:
    verdicts = Duplicates().judge(texts(text, "Find the sum of all primes.", text), ignore)
    assert reasons(verdicts) == [None, None, "duplicate"]


def test_shingles_do_not_depend_on_typesetting() -> None:
    assert tokens(r"$\dfrac{1}{2}X$ is 1{,}000") == ["frac", "1", "2", "x", "is", "1000"]
    assert tokens("9-6+4") == ["9", "-", "6", "+", "4"]
    assert tokens("求x的值") == ["求", "x", "的", "值"]
    assert numbers(tokens("b 10 a 9 10")) == "10 10 9"
    assert ngrams(["a", "b", "c"], 2) == {"a b", "b c"}
    assert ngrams(["a"], 2) == {"a"}
    assert jaccard({"a", "b"}, {"b", "c"}) == 1 / 3


def test_paraphrases_equal_those_of_comparing_every_pair() -> None:
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(90, 16), dim=-1)
    noise = torch.randn(1300, 16) * torch.rand(1300, 1) * 0.4
    vectors = torch.nn.functional.normalize(centres[torch.arange(1300) % 90] + noise, dim=-1)
    rows = texts(*(f"some words and {number % 2} or so" for number in range(1300)))
    verdicts = Paraphrases(threshold=0.9).judge(rows, ignore, embed=lambda rows, advance: vectors)

    exact = (vectors.double() @ vectors.double().T).tolist()
    kept: list[int] = []
    for index in range(1300):
        similarities = [exact[index][earlier] for earlier in kept if (earlier - index) % 2 == 0]
        # No pair is so close to the threshold that float32 decides.
        assert all(abs(similarity - 0.9) > 1e-6 for similarity in similarities)
        if not any(similarity >= 0.9 for similarity in similarities):
            kept.append(index)
    assert [index for index, reason in enumerate(reasons(verdicts)) if reason is None] == kept
    assert 200 < len(kept) < 1200
