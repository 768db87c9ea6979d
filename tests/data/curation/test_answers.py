"""Which reference answers the verifier can tell from others."""

import pytest

from megatron_orz.data.curation.answers import judge_answers
from megatron_orz.rewards.math_answer import Verifier
from tests.data.curation.rows import candidates, ignore, published, reasons
from tests.rewards.test_math_answer import be_quick_with

GOOD = ["7", "1,000", r"\frac{1}{2}", r"\text{Evelyn}", "(2,5)", "x^2 + 1", r"\{1, 2\}", "x = 3", r"\sqrt{2}\,\text{m}"]
UNREADABLE = ["x^2+", "?", r"\frac{1", r"x \equiv 1 \pmod 3", "{{{"]
ENDLESS = ["9^{9^{9^9}}"]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout_s=60.0) as verifier:
        yield verifier


def test_answers_the_verifier_cannot_read_go(verifier: Verifier) -> None:
    rows = candidates([("q", answer) for answer in GOOD + UNREADABLE + GOOD])
    done: list[int] = []
    verdicts = judge_answers(rows, done.append, recognise=verifier.recognise)
    expected = [None] * len(GOOD) + ["unverifiable"] * len(UNREADABLE) + [None] * len(GOOD)
    assert reasons(verdicts) == expected
    assert sum(done) == len(rows)


def test_an_answer_without_end_costs_its_deadline_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = candidates([("q", answer) for answer in [*ENDLESS, r"\frac{3}{4}", "5"]])
    be_quick_with(ENDLESS, monkeypatch)
    with Verifier() as verifier:
        verdicts = judge_answers(rows, ignore, recognise=verifier.recognise)
    assert reasons(verdicts) == ["verifier_timeout", None, None]


def test_all_answers_of_published_sets_can_be_verified(verifier: Verifier) -> None:
    for name in ("math500.json", "aime2024.json"):
        verdicts = judge_answers(candidates(published(name)), ignore, recognise=verifier.recognise)
        assert set(reasons(verdicts)) == {None}
