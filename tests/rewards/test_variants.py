"""Answers equal themselves in every way of writing them, and agree with math-verify's own verdicts.

The pairs of `AGREED` go through the categories of math-verify's tests (numbers, notation, sets, intervals, matrices,
relations, percent, text), in values of their own.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.rewards.math_answer import Verifier
from tests.rewards.variants import VARIANTS

MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.json"
# Answers in the forms of MATH500's references; each category of variants has some that it applies to.
REFERENCES = [
    *("7", "-12", "0", "1836", "22,500", "0.35", "12.5", "\\frac{3}{4}", "-\\frac{7}{3}", "\\frac{17}{40}"),
    *("90^\\circ", "35^{\\circ}", "\\text{Monday}", "\\text{(D)}", "\\text{odd}", "40\\%", "12.5\\%", "3, 5, 8"),
    *("-2,1,6", "\\left( 4, \\frac{\\pi}{6} \\right)", "(3,-1)", "[-3,5]", "2\\sqrt{3}", "\\sqrt[3]{5}", "6 - 5i"),
    *("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "(-\\infty, 1) \\cup (4, \\infty)", "x^2 - 3x + 2", "1011_2"),
]

# Answer, reference, whether they are equal.
AGREED = [
    # numbers
    ("-8", "-8", True),
    ("-8", "8", False),
    ("3,140,000", "3140000", True),
    ("512.0", "512", True),
    (".75", "0.75", True),
    ("0.333", "1/3", False),
    ("1.5e3", "1500", False),
    ("\\$47.25", "47.25", True),
    ("2 \\times 10^{3}", "2000", True),
    # fractions and roots
    ("\\frac{14}{5}", "14/5", True),
    ("-\\frac{14}{5}", "\\frac{-14}{5}", True),
    ("\\frac{14}{-5}", "-\\frac{14}{5}", True),
    ("\\cfrac{2}{7}", "\\frac27", True),
    ("\\sqrt5", "\\sqrt{5}", True),
    ("\\frac{6}{\\sqrt{3}}", "2\\sqrt{3}", True),
    ("\\sqrt{8}", "2\\sqrt{3}", False),
    ("\\frac{\\sqrt{6}+\\sqrt{2}}{4}", "\\cos \\frac{\\pi}{12}", True),
    # notation
    ("\\left(\\frac{2}{9}\\right)", "\\frac{2}{9}", True),
    ("\\frac{2}{9}\\text{ metres}", "\\frac{2}{9}", True),
    ("m = \\frac{2}{9}", "\\frac{2}{9}", True),
    ("\\boxed{11}", "11", True),
    ("5\\cdot 9", "45", True),
    ("3!", "6", True),
    ("\\binom{6}{2}", "15", True),
    ("\\pi r^2", "r^2\\pi", True),
    # percent and degrees
    ("64\\%", "64", True),
    ("64 \\%", "64\\%", True),
    ("60^\\circ", "60", True),
    # sets, tuples, intervals
    ("\\{4, 1, 9\\}", "\\{1, 4, 9\\}", True),
    ("\\{1, 4\\}", "\\{1, 4, 9\\}", False),
    ("(1, 4, 9)", "(4, 1, 9)", False),
    ("[2, 6)", "[2, 6)", True),
    ("[2, 6]", "[2, 6)", False),
    ("(-\\infty, 3)", "(-\\infty, 3]", False),
    ("[0,1] \\cup [2,3]", "[2,3] \\cup [0,1]", True),
    ("\\emptyset", "\\{\\}", True),
    ("x \\in (2, 5)", "(2, 5)", True),
    # polynomials and relations
    ("(y-4)(y+4)", "y^2-16", True),
    ("y^2-15", "y^2-16", False),
    ("3a + 2b", "2b + 3a", True),
    ("y = 4x - 1", "4x - 1", True),
    ("4x - y = 1", "8x - 2y = 2", True),
    ("a < 7", "7 > a", True),
    ("a \\le 7", "a < 7", False),
    # matrices and complex numbers
    ("\\begin{bmatrix} 2 & 0 \\\\ 1 & 3 \\end{bmatrix}", "\\begin{pmatrix} 2 & 0 \\\\ 1 & 3 \\end{pmatrix}", True),
    ("\\begin{pmatrix} 2 & 1 \\\\ 0 & 3 \\end{pmatrix}", "\\begin{pmatrix} 2 & 0 \\\\ 1 & 3 \\end{pmatrix}", False),
    ("4i - 3", "-3 + 4i", True),
    ("2i \\cdot 3", "6i", True),
    # text
    ("\\text{even}", "even", True),
    ("\\text{even}", "\\text{odd}", False),
]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout_s=120.0, num_workers=1) as verifier:
        yield verifier


def cases_of(references: list[str]) -> list[tuple[str, str, str]]:
    return [
        (name, variant, reference)
        for reference in references
        for name, variants in VARIANTS.items()
        for variant in variants(reference)
    ]


def refused(verifier: Verifier, cases: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """The variants that are not taken for their references."""
    responses = [(f"<answer>\\boxed{{{variant}}}</answer>", "stop", reference) for _, variant, reference in cases]
    for case, grade in zip(cases, verifier.grade(responses), strict=True):
        if not grade.is_correct:
            yield case


def test_every_way_of_writing_an_answer_is_the_answer(verifier: Verifier) -> None:
    cases = cases_of(REFERENCES)
    assert min(Counter(name for name, *_ in cases).values()) >= 2
    assert {name for name, *_ in cases} == set(VARIANTS)
    assert list(refused(verifier, cases)) == []


@pytest.mark.slow
def test_every_way_of_writing_math500s_references_is_the_reference(verifier: Verifier) -> None:
    """About 1,900 variants of 301 references: some ten seconds."""
    if not MATH500.is_file():
        pytest.skip("math500.json is not there")
    references = sorted({item["final_answer"] for item in json.loads(MATH500.read_text())})
    cases = [("itself", reference, reference) for reference in references] + cases_of(references)
    assert len(cases) > 2000
    assert list(refused(verifier, cases)) == []


def test_verdicts_are_right_and_math_verifys_own(verifier: Verifier) -> None:
    responses = [(f"<answer>\\boxed{{{answer}}}</answer>", "stop", reference) for answer, reference, _ in AGREED]
    ours = [grade.is_correct for grade in verifier.grade(responses)]
    assert [case for case, verdict in zip(AGREED, ours, strict=True) if verdict is not case[2]] == []

    math_verify = pytest.importorskip("math_verify")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    theirs = [
        math_verify.verify(
            math_verify.parse(f"${reference}$", parsing_timeout=None),
            math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None),
            timeout_seconds=None,
        )
        for answer, reference, _ in AGREED
    ]
    logging.disable(disabled)
    assert [case for case, verdict in zip(AGREED, theirs, strict=True) if verdict is not case[2]] == []
