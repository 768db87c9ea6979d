"""Letters of options, as models write them."""

import pytest

from megatron_orz.rewards.choice import grade_choice, option_letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("c", "C"),
        (" $C$ ", "C"),
        ("(C)", "C"),
        ("C.", "C"),
        ("C)", "C"),
        ("C. Paris", "C"),
        ("(D) 3 and 4 protons", "D"),
        ("\\text{C}", "C"),
        ("\\textbf{(C)}", "C"),
        ("\\mathrm{J}: x", "J"),
        ("Option B: the cat", "B"),
        ("answer: d", "D"),
        ("A cat", None),
        ("Cat", None),
        ("A, B", None),
        ("A or B", None),
        ("(A) or (B)", None),
        ("A. one, B. two", None),
        ("42", None),
        ("", None),
        ("\\frac{A}{B}", None),
        ("\uff21", None),  # a full-width A
    ],
)
def test_letters(answer: str, letter: str | None) -> None:
    assert option_letter(answer) == letter


def test_only_the_right_letter_in_a_finished_response_is_rewarded() -> None:
    def grade(boxed: str, finish_reason: str = "stop"):
        return grade_choice((f"<answer> \\boxed{{{boxed}}} </answer>", finish_reason, "C"))

    assert (grade("C").reward, grade("C").is_correct, grade("C").extracted) == (1.0, True, "C")
    assert (grade("(C)", "length").reward, grade("(C)", "length").is_correct) == (0.0, True)
    assert (grade("B").reward, grade("B").is_formatted) == (0.0, True)
    assert grade("42").is_correct is False
    missing = grade_choice(("the answer is C", "stop", "C"))
    assert (missing.reward, missing.is_formatted, missing.extracted) == (0.0, False, None)
