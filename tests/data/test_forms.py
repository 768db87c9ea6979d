"""Rows as benchmarks publish them, and the problems that they become."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_orz.data.reading import Problem, RowError, read_rows
from megatron_orz.rewards.code import CodeTests

GPQA = {
    "Question": "Which is a metal?",
    "Correct Answer": "iron",
    "Incorrect Answer 1": "oxygen",
    "Incorrect Answer 2": "neon",
    "Incorrect Answer 3": "sulphur",
    "Subdomain": "Chemistry",
}
TESTS = [{"input": "1", "output": "2", "testtype": "stdin"}, {"input": "3", "output": "4", "testtype": "stdin"}]


def live_code_bench(private_tests: str, metadata: str = "{}") -> dict[str, str]:
    return {
        "question_content": "Add one.",
        "starter_code": "class Solution: ...",
        "public_test_cases": json.dumps(TESTS[:1]),
        "private_test_cases": private_tests,
        "metadata": metadata,
    }


def read(tmp_path: Path, *rows: Any, **options: Any) -> list[Problem | RowError]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows(path, **options))


def read_one(tmp_path: Path, row: Any, **options: Any) -> Problem:
    (problem,) = read(tmp_path, row, **options)
    assert isinstance(problem, Problem), problem
    return problem


def test_options_are_shuffled_by_seed_and_the_letter_follows(tmp_path: Path) -> None:
    letters = Counter()
    for seed in range(60):
        problem = read_one(tmp_path, GPQA, option_seed=seed)
        assert problem.kind == "choice"
        assert f"\n{problem.answer}. iron\n" in problem.text
        assert all(f". {option}\n" in problem.text for option in ("oxygen", "neon", "sulphur"))
        assert read_one(tmp_path, GPQA, option_seed=seed) == problem
        letters[problem.answer] += 1
    # 15 are expected of each; fewer than 5 of any has a probability below 0.2 %.
    assert min(letters[letter] for letter in "ABCD") >= 5


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}, "B"),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": "b"}, "B"),
        ({"question": "2 + 2?", "options": ["3", "5", "4"], "answer": "C", "answer_index": 2}, "C"),
    ],
)
def test_options_with_a_letter_keep_their_order(tmp_path: Path, row: dict[str, Any], answer: str) -> None:
    problem = read_one(tmp_path, row)
    assert (problem.answer, problem.kind) == (answer, "choice")
    assert f"\n{answer}. 4\n" in problem.text
    assert problem.text.startswith("2 + 2?\n\nA. 3\nB. ")


def test_programs_with_tests(tmp_path: Path) -> None:
    problem = read_one(tmp_path, {"question": "Add one.", "tests": TESTS})
    assert problem.kind == "code"
    assert "reads standard input" in problem.text
    tests = CodeTests.from_json(problem.answer)
    assert (tests.function, tests.tests) == (None, (("1", "2"), ("3", "4")))
    function = read_one(
        tmp_path, {"question": "Add one.", "tests": TESTS, "function": "add", "starter_code": "def add"}
    )
    assert CodeTests.from_json(function.answer).function == "add"
    assert "def add" in function.text


@pytest.mark.parametrize("compress", [False, True])
def test_live_code_bench_with_private_tests(tmp_path: Path, compress: bool) -> None:
    private = json.dumps(TESTS[1:])
    if compress:
        private = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
    problem = read_one(tmp_path, live_code_bench(private, '{"func_name": "add"}'))
    assert CodeTests.from_json(problem.answer) == CodeTests("add", (("1", "2"), ("3", "4")))
    assert "defines add" in problem.text


def test_a_pickle_that_is_more_than_a_text_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for value in (Bomb(), ["[]"], 3):
        private = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
        (row,) = read(tmp_path, live_code_bench(private))
        assert isinstance(row, RowError)
        assert "LiveCodeBench" in str(row)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**GPQA, "Correct Answer": ""}, "is no GPQA problem: its Correct Answer is empty"),
        ({"question": "?", "choices": ["3"], "answer": 0}, "has 1 options"),
        ({"question": "?", "choices": ["3", "4"], "answer": 2}, "neither a letter of its 2 options nor an index"),
        ({"question": "?", "choices": ["3", "4"], "answer": "Z"}, "neither a letter"),
        ({"question": "?", "choices": ["3", "4"], "answer": None}, "neither a letter"),
        ({"question": "?", "choices": "34", "answer": 0}, "not a list of texts"),
        ({"question": "?", "tests": []}, "no tests"),
        ({"question": "?", "tests": [{"input": 1, "output": "2"}]}, "not all objects"),
        ({"question": "?", "tests": TESTS, "function": "os.system"}, "is no name"),
        (live_code_bench("not base64!"), "neither JSON nor compressed"),
        (live_code_bench("[]", "{"), "is no LiveCodeBench problem"),
        ({"question": "?", "answer": "1", "kind": "essay"}, "none of math, choice, code"),
        ({"question": "?", "answer": "42", "kind": "choice"}, "not the letter of an option"),
        ({"question": "?", "answer": "42", "kind": "code"}, "of kind code is not"),
        ({"question": "?", "answer": "x", "kind": "code"}, "line 1"),
        ({"question": "?", "answer": '{"tests": [{"input": "1"}]}', "kind": "code"}, "not all objects"),
        ({"question": "?", "answer": json.dumps({"function": "f(", "tests": TESTS}), "kind": "code"}, "is no name"),
        (live_code_bench("[]") | {"public_test_cases": TESTS}, "its public_test_cases is empty or no text"),
        (live_code_bench("[]") | {"public_test_cases": "7"}, "its tests are no lists"),
        (live_code_bench("[]") | {"metadata": ["add"]}, "its metadata is empty or no text"),
        (live_code_bench("[]", "[]"), "its metadata is no object"),
    ],
)
def test_bad_rows_are_named_and_the_next_one_is_read(tmp_path: Path, row: Any, sentence: str) -> None:
    bad, good = read(tmp_path, row, {"question": "1 + 1", "answer": "2"})
    assert isinstance(bad, RowError)
    assert sentence in str(bad)
    assert "line 1" in str(bad)
    assert isinstance(good, Problem)
    assert (good.answer, good.kind) == ("2", "math")


def test_a_column_says_the_kind(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"question": "A. x B. y", "answer": "B", "kind": "choice"}).kind == "choice"
    reference = json.dumps({"function": None, "tests": TESTS})
    program = read_one(tmp_path, {"question": "Add one.", "answer": reference, "kind": "code"})
    assert (program.kind, program.answer) == ("code", reference)


def test_tables_are_read_in_every_form(tmp_path: Path) -> None:
    tables = {
        "gpqa": [GPQA],
        "mmlu": [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "subject": "math"}],
        "code": [{"question": "Add one.", "tests": TESTS}],
        "lcb": [live_code_bench(json.dumps(TESTS))],
        "plain": [{"question": "1 + 1", "answer": "2", "kind": "math"}],
    }
    kinds = {}
    for name, rows in tables.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        (problem,) = read_rows(path)
        assert isinstance(problem, Problem), problem
        assert problem == replace(read_one(tmp_path, rows[0]), place=problem.place)
        kinds[name] = problem.kind
    assert kinds == {"gpqa": "choice", "mmlu": "choice", "code": "code", "lcb": "code", "plain": "math"}
