"""Multiple choice, proofs, and answers that are no values."""

import time

import pytest

from megatron_orz.data.curation.rules import Rules
from tests.data.curation.rows import candidates, ignore, published, reasons


def reason(text: str, answer: str = "7") -> str | None:
    [verdict] = Rules().judge(candidates([(text, answer)]), ignore)
    return verdict.reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Which is prime? (A) 4 (B) 9 (C) 11", "11"),
        ("Which is prime?\nA. 4\nB. 9\nC. 11\nD. 12", "C"),
        ("Which is prime?\n A) 4\n B) 9\n C) 11", "C"),
        (r"$\textbf{(A)}\ 4 \qquad\textbf{(B)}\ 9 \qquad\textbf{(C)}\ 11$", "11"),
        (r"Pick: \text{A.} 4 \text{B.} 9 \text{C.} 11", "11"),
        ("Which of the following curves is it? A line, B circle, C plane.", r"\text{(C)}"),
        ("Is 91 prime?", "No"),
        ("Is 97 prime?", r"\text{yes}"),
        ("The series converges.", "True."),
    ],
)
def test_multiple_choice_goes(text: str, answer: str) -> None:
    assert reason(text, answer) == "multiple_choice"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("P(A) = 0.2, P(B) = 0.3 and P(C) = 0.4. Find P(A or B or C) if they are independent.", "0.664"),
        ("Triangle ABC has A. B lies on the line to C. Find the area of ABC.", "6"),
        ("Points $A$, $B$, and $C$ lie on a circle. What is the length of $AC$?", "5"),
        ("(A) farmer has 3 cows and buys 4. How many cows are there?", "7"),
        ("[asy] draw((A)--(B)--(C)); [/asy] What is the area?", "9"),
        ("Which of the following numbers of rows fits?", "12"),
        ("In hexadecimal, what is 6 + 6?", "C"),
        ("Who wins?", r"\text{Evelyn}"),
    ],
)
def test_what_only_looks_like_multiple_choice_stays(text: str, answer: str) -> None:
    assert reason(text, answer) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Prove that $\\sqrt{2}$ is irrational.", "\\sqrt{2}"),
        ("Let n be even. Show that n^2 is divisible by 4.", "4"),
        ("Prove, for all $n$, that $n^2+n$ is even.", "2"),
        ("证明 $n^2+n$ 是偶数。", "2"),
        ("What is it?", "Proof."),
        ("What is it?", r"\text{proved above}"),
        ("What is it?", "see solution"),
        ("What is it?", r"\blacksquare"),
    ],
)
def test_proofs_go(text: str, answer: str) -> None:
    assert reason(text, answer) == "proof"


@pytest.mark.parametrize(
    "text",
    [
        "Show that the sequence converges and find its limit.",
        "Alice can prove that she has 3 coins. How many has Bob?",
        "The show that Tom watches lasts 3 hours. How long is half of it?",
        "Find the smallest $n$ for which you can prove that the sum exceeds 10.",
        "Improve that estimate by computing $1/7$.",
    ],
)
def test_problems_with_a_question_besides_the_proof_stay(text: str) -> None:
    assert reason(text) is None


@pytest.mark.parametrize("answer", ["See the appendix for it", "any even integer", "it depends on the value of n"])
def test_sentences_are_no_answers(answer: str) -> None:
    assert reason("What is it?", answer) == "prose_answer"


@pytest.mark.parametrize(
    "answer",
    [
        "5 square meters per second",
        r"864 \mbox{ inches}^2",
        r"\frac{270}7\text{ degrees}",
        r"\text{no solution}",
        r"\left(-\infty, 2\right) \cup \left(3, \infty\right)",
        "Tuesday",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    ],
)
def test_values_with_words_stay(answer: str) -> None:
    assert reason("What is it?", answer) is None


def test_long_problems_and_answers_go_before_anything_else_looks_at_them() -> None:
    start = time.process_time()
    assert reason("(A) (B) " * 1_300_000) == "too_long"
    assert reason("What is it?", "x + " * 100 + "1") == "too_long"
    # Within the limits, what a backtracking pattern would take minutes for.
    assert reason("(A) (B) " * 990) is None
    assert reason("\nA. " * 1500 + "\nB. " * 400) is None
    assert time.process_time() - start < 2


def test_published_sets_lose_their_multiple_choice_and_nothing_else() -> None:
    """MATH500 holds three problems that list options (items 228, 256 and 297); GSM8K and AIME hold none."""
    verdicts = reasons(Rules().judge(candidates(published("math500.json")), ignore))
    assert {number: reason for number, reason in enumerate(verdicts, start=1) if reason} == {
        228: "multiple_choice",
        256: "multiple_choice",
        297: "multiple_choice",
    }
    for name in ("aime2024.json", "gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        assert set(reasons(Rules().judge(candidates(published(name)), ignore))) == {None}
