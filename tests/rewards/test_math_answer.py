"""Extraction, equivalence, and what the verifier survives."""

import contextlib
import json
import logging
import re
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_orz.rewards import math_answer, math_worker
from megatron_orz.rewards.math_answer import Verifier, extract_answer, quick_verdict
from megatron_orz.types import Grade

MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.json"
BOMBS = ["9^{9^{9^9}}", "100000000!", r"\binom{10^9}{10^8}"]


def boxed(answer: str) -> str:
    return f"so it is.</think> <answer> \\boxed{{{answer}}} </answer>"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout_s=120.0) as verifier:
        yield verifier


def compare(verifier: Verifier, pairs: list[tuple[str, str]]) -> list[bool]:
    return [grade.is_correct for grade in verifier.grade([(boxed(a), "stop", r) for a, r in pairs])]


def workers() -> list[psutil.Process]:
    """The verifier processes of this test session, those that are alive."""
    return [child for child in psutil.Process().children() if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and any("math_worker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False


def pattern_answer(response: str) -> str | None:
    """The recipe's pattern itself, then the last box whose braces balance, by trying each."""
    matches = re.findall(r"<answer>.*?(\\boxed{.*}).*?</answer>", response, re.DOTALL)
    if not matches:
        return None
    for box in reversed(list(re.finditer(r"\\boxed{", matches[-1]))):
        depth = 1
        for end in range(box.end(), len(matches[-1])):
            depth += {"{": 1, "}": -1}.get(matches[-1][end], 0)
            if depth == 0:
                return matches[-1][box.end() : end].strip() or None
    return None


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "\\boxed{", "{", "}", "}", "1", "\n"]), max_size=14))
def test_extraction_equals_the_recipes_pattern(pieces: list[str]) -> None:
    response = "".join(pieces)
    assert extract_answer(response) == pattern_answer(response)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("think</think><answer>\\boxed{42}</answer>", "42"),
        ("<answer>It is\n$\\boxed{\\frac{1}{2}}$.\n</answer> and more", "\\frac{1}{2}"),
        ("<answer>\\boxed{1} or \\boxed{2}</answer>", "2"),
        ("<answer>\\boxed{1}</answer> no, <answer>\\boxed{2}</answer>", "2"),
        ("<answer>\\boxed{\\boxed{3}}</answer>", "3"),
        ("<answer>\\boxed{\\left\\{ 1, 2 \\right.}</answer>", "\\left\\{ 1, 2 \\right."),
        ("<answer>\\\\boxed{5}</answer>", "5"),
        ("<answer>\\boxed{4} or \\boxed{{5}</answer>", "4"),
        ("<answer>42</answer>", None),
        ("\\boxed{42}", None),
        ("<answer>\\boxed{42}", None),
        ("<answer>\\boxed{42</answer>", None),
        ("<answer>\\boxed{}</answer>", None),
        ("", None),
    ],
)
def test_extracted_answers(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "hostile",
    [
        "<answer>" * 125_000,
        "<answer>\\boxed{" * 60_000,
        "<answer>" + "\\boxed{" * 140_000 + "</answer>",
        "<answer>\\boxed{" + "{" * 10**6 + "}</answer>",
        "<answer>\\boxed{}" * 60_000 + "</answer>",
        "<answer>\\boxed{" + "}" * 10**6 + "</answer" * 100,
        "<answer>\\boxed{" + " " * 10**6 + "1}</answer>",
        "<answer>\\boxed{" + "9" * 10**6 + "}</answer>",
    ],
)
def test_hostile_text_of_a_megabyte_is_graded_in_linear_time(hostile: str) -> None:
    start = time.process_time()
    answer = extract_answer(hostile)
    if answer is not None:
        quick_verdict(answer, "9" * 50)
    # A tenth of a second; the recipe's pattern would take hours on most of them.
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("42", "42", True),
        (" $42$. ", "42", True),
        ("\\$18.90", "18.9", True),
        ("32,348", "\\$32,\\!348", True),
        (".5", "0.50", True),
        ("-0", "0", True),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True),
        ("Evelyn", "\\text{Evelyn}", True),
        ("12.5\\%", "12.5", True),
        ("12.5", "12.50 \\%", True),
        ("7\\,\\%", "7%", True),
        ("41", "42", False),
        ("0.0000670", ".0000672", False),
        ("1" * 2000, "2", False),
        ("12", "1 2", None),
        ("0.4", "40\\%", None),
        ("\\%", "%", None),
        ("x \\leftarrow y", "xarrowy", None),
        ("1/2", "0.5", None),
        ("٤٢", "42", None),
    ],
)
def test_quick_verdicts(answer: str, reference: str, verdict: bool | None) -> None:
    assert quick_verdict(answer, reference) is verdict


def test_equivalent_answers_are_equal(verifier: Verifier) -> None:
    pairs = [
        (r"\frac12", r"\frac{1}{2}"),
        ("1/2", "0.5"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("0.25", r"\frac{1}{4}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
        ("-2,1", "1,-2"),
        ("[-2,7]", r"x \in [-2,7]"),
        (r"\frac{275}{2}", r"137 \frac{1}{2}"),
        ("ab+2a+5b+10", "(a+5)(b+2)"),
        ("2x+3", "y = 2x + 3"),
        ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"),
        (r"\begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
        (r"\sin^2 x + \cos^2 x", "1"),
        (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
        ("90", r"90^\circ"),
        ("5.4", r"5.4 \text{ cents}"),
        ("C", r"\text{(C)}"),
        ("2^{10}", "1024"),
        (r"\log_2 8", "3"),
        ("i+6", "6+i"),
    ]
    assert [pair for pair, is_equal in zip(pairs, compare(verifier, pairs), strict=True) if not is_equal] == []


def test_different_answers_are_not_equal(verifier: Verifier) -> None:
    pairs = [
        (r"\frac13", r"\frac{1}{2}"),
        ("y=5", "x=5"),
        ("(2,1)", "(1,2)"),
        ("(2,3)", "[2,3]"),
        ("y = 3x + 2", "y = 2x + 3"),
        ("x^2+1", "x^2-1"),
        (r"\begin{pmatrix} 1/5 \\ 18/5 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
        (r"-\infty", r"\infty"),
        ("3.14159", r"\pi"),
        (r"\sqrt{2}+10^{-4}", r"\sqrt{2}"),
        ("53_8", "52_8"),
        (r"\text{seat}", r"\text{east}"),
        ("B", r"\text{(C)}"),
        # Hedging: the reference among other answers.
        ("5, 6", "6"),
        (r"6 \text{ or } 7", "6"),
        (r"\pm 6", "6"),
        ("the answer is 6", "6"),
        ("???", "6"),
    ]
    assert [pair for pair, is_equal in zip(pairs, compare(verifier, pairs), strict=True) if is_equal] == []


def test_numeric_shortcut_never_contradicts_a_proof() -> None:
    sympy = pytest.importorskip("sympy")
    x, y = sympy.symbols("x y")
    identities = [
        (sympy.sin(x) ** 2, 1 - sympy.cos(x) ** 2),
        ((x + y) ** 2, x**2 + 2 * x * y + y**2),
        (sympy.sqrt(3 + 2 * sympy.sqrt(2)), 1 + sympy.sqrt(2)),
        (sympy.exp(sympy.I * sympy.pi), sympy.Integer(-1)),
        (sympy.log(x * y), sympy.log(x) + sympy.log(y)),
        (sympy.Float("0.333333"), sympy.Rational(1, 3)),
    ]
    assert not any(math_worker.surely_different(left, right) for left, right in identities)
    assert all(math_worker.surely_different(left, right + sympy.Rational(1, 100)) for left, right in identities)
    # What is not an elementary expression is left to math-verify.
    assert not math_worker.surely_different(sympy.Interval(0, 1), sympy.Integer(2))
    assert not math_worker.surely_different("text", sympy.Integer(2))
    assert not math_worker.surely_different(1 / (x - x), sympy.Integer(2))


def test_math500_references_equal_themselves_also_in_math_verify() -> None:
    if not MATH500.is_file():
        pytest.skip("math500.json is not there")
    references = sorted({item["final_answer"] for item in json.loads(MATH500.read_text())})
    assert all(extract_answer(boxed(reference)) == reference for reference in references)
    assert all(quick_verdict(reference, reference) for reference in references)
    disabled = logging.root.manager.disable
    equal, _ = math_worker.load_comparison()
    logging.disable(disabled)  # loading silences the logging of a whole process
    assert [reference for reference in references if not equal(reference, reference)] == []


def test_reward_needs_a_right_answer_in_a_finished_response(verifier: Verifier) -> None:
    responses = [
        (boxed("7"), "stop", "7"),
        (boxed("7"), "length", "7"),
        (boxed("8"), "stop", "7"),
        ("<answer>7</answer>", "stop", "7"),
        (boxed("\\frac{14}{2}"), "abort", "7"),
    ]
    fields = [
        (1.0, True, True, "7"),
        (0.0, True, True, "7"),
        (0.0, False, True, "8"),
        (0.0, False, False, None),
        (0.0, True, True, "\\frac{14}{2}"),
    ]
    expected = [
        Grade(reward=reward, is_correct=is_correct, is_formatted=is_formatted, timed_out=False, extracted=extracted)
        for reward, is_correct, is_formatted, extracted in fields
    ]
    assert verifier.grade(responses) == expected
    assert verifier.grade([]) == []


def test_progress_is_told_once_for_every_response(verifier: Verifier) -> None:
    calls: list[int] = []
    responses = [(boxed(answer), "stop", "1/2") for answer in ("0.5", "0.5", "7", "0.5", r"\frac{2}{3}")] + [
        ("", "stop", "1")
    ]
    verifier.grade(responses, on_grade=lambda: calls.append(1))
    assert len(calls) == len(responses)


def test_repeated_pairs_are_compared_once(verifier: Verifier) -> None:
    verifier.grade([(boxed("1/2"), "stop", "0.5")])
    before = sum(worker.cpu_times().user for worker in workers())
    grades = verifier.grade([(boxed("ab+2a+5b+10"), "stop", "(a+5)(b+2)")] * 20_000)
    assert all(grade.reward == 1.0 for grade in grades)
    # One comparison takes milliseconds, and perhaps the start of a process; 20,000 would take over a minute.
    assert sum(worker.cpu_times().user for worker in workers()) - before < 20.0


def test_workers_import_neither_torch_nor_the_training_script(verifier: Verifier) -> None:
    verifier.grade([(boxed("1/2"), "stop", "0.5")])
    assert workers()
    for worker in workers():
        assert not any("torch" in region.path for region in worker.memory_maps())


def test_bombs_cost_their_deadline_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [(boxed(f"\\frac{{{2 * number}}}{{2}}"), "stop", str(number)) for number in range(1, 11)]
    be_quick_with(BOMBS, monkeypatch)
    with Verifier() as verifier:
        verifier.grade(good[:2])
        start = time.monotonic()
        grades = verifier.grade([*good[:5], *((boxed(bomb), "stop", r"\frac{x+1}{7}") for bomb in BOMBS), *good[5:]])
        elapsed_s = time.monotonic() - start
    bombs = grades[5:8]
    assert [(bomb.timed_out, bomb.is_correct, bomb.reward) for bomb in bombs] == [(True, False, 0.0)] * 3
    assert [grade.reward for grade in grades[:5] + grades[8:]] == [1.0] * 10
    # Two deadlines in a row on one of the two processes, and the starts of new ones on a busy machine.
    assert elapsed_s < 2 * 1.5 + 120


def be_quick_with(endless: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A short deadline for comparisons without an end, and one for all others that a busy machine keeps."""
    compare = math_answer._Worker.compare

    def patient(worker: math_answer._Worker, answer: str, reference: str | None) -> bool | None:
        worker._timeout_s = 1.5 if answer in endless else 120.0
        return compare(worker, answer, reference)

    monkeypatch.setattr(math_answer._Worker, "compare", patient)


def test_memory_of_a_worker_is_limited(verifier: Verifier) -> None:
    verifier.grade([(boxed("1/2"), "stop", "0.5")])
    assert {worker.rlimit(psutil.RLIMIT_AS) for worker in workers()} == {(2 * 2**30, 2 * 2**30)}


def test_killed_workers_are_replaced_and_a_pair_that_kills_two_is_undecided() -> None:
    settled = {worker.pid for worker in workers()}

    def own() -> list[psutil.Process]:
        return [worker for worker in workers() if worker.pid not in settled]

    with Verifier(timeout_s=60.0, num_workers=1) as verifier:
        [first] = verifier.grade([(boxed("1/2"), "stop", "0.5")])
        [idle] = own()
        start_s = idle.cpu_times().user
        idle.kill()
        [second] = verifier.grade([(boxed("1/4"), "stop", "0.25")])
        assert first.reward == second.reward == 1.0
        assert idle.pid not in {worker.pid for worker in own()}

        is_done = threading.Event()

        def kill_whoever_runs_long() -> None:
            while not is_done.wait(0.1):
                for worker in own():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if worker.cpu_times().user > 2 * start_s + 1:
                            worker.kill()

        killer = threading.Thread(target=kill_whoever_runs_long)
        killer.start()
        [bomb] = verifier.grade([(boxed(BOMBS[1]), "stop", r"\frac{x+1}{7}")])
        is_done.set()
        killer.join()
        [third] = verifier.grade([(boxed("1/8"), "stop", "0.125")])
    assert (bomb.timed_out, bomb.is_correct, bomb.reward) == (True, False, 0.0)
    assert third.reward == 1.0


def test_closing_ends_the_processes() -> None:
    before = {worker.pid for worker in workers()}
    with Verifier(timeout_s=120.0) as verifier:
        verifier.grade([(boxed("1/2"), "stop", "0.5")])
        assert {worker.pid for worker in workers()} > before
    assert {worker.pid for worker in workers()} == before


def test_easy_answers_start_no_process() -> None:
    before = len(workers())
    with Verifier() as verifier:
        start = time.process_time()
        grades = verifier.grade([(boxed(str(number)), "stop", str(number // 2 * 2)) for number in range(20_000)])
        elapsed_s = time.process_time() - start
        assert len(workers()) == before
    assert sum(grade.reward for grade in grades) == 10_000
    assert elapsed_s < 4.0  # 5,000 a second; a tenth of it is usual


def test_worker_program_ends_with_its_connection() -> None:
    ours, theirs = Pipe()
    program = [sys.executable, "-P", math_worker.__file__, str(theirs.fileno()), "5", "1"]
    with theirs:
        process = subprocess.Popen(program, pass_fds=[theirs.fileno()])
    assert ours.recv_bytes() == b"[]"
    ours.send_bytes(b'["1/2", "0.5"]')
    assert ours.recv_bytes() == b"true"
    ours.close()
    assert process.wait(timeout=120) == 0
