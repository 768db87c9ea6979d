"""Programs against tests, honest ones and those that try to be rewarded otherwise."""

from __future__ import annotations

import json

import pytest

from megatron_orz.rewards.code import CodeTests, extract_program, grade_code, same_output, same_value
from megatron_orz.rewards.confinement import Limits
from megatron_orz.types import Grade

SUM = json.dumps({"function": None, "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]})
LIMITS = Limits(wall_s=120.0)


def response(program: str) -> str:
    return f"so.</think> <answer>\n```python\n{program}\n```\n</answer>"


def grade(program: str, reference: str = SUM, finish_reason: str = "stop", limits: Limits = LIMITS) -> Grade:
    return grade_code((response(program), finish_reason, reference), limits)


def calls(function: str, *tests: tuple[str, str]) -> str:
    pairs = [{"input": given, "output": expected} for given, expected in tests]
    return json.dumps({"function": function, "tests": pairs})


def test_a_program_must_pass_every_test_in_a_finished_response() -> None:
    right = "a, b = map(int, input().split())\nprint(a + b)"
    assert grade(right) == Grade(
        reward=1.0, is_correct=True, is_formatted=True, timed_out=False, extracted=right + "\n"
    )
    assert grade("input(); print(3)").is_correct is False
    assert (grade(right, finish_reason="length").reward, grade(right, finish_reason="length").is_correct) == (0.0, True)
    assert grade(right + "\nexit(1)").reward == 0.0
    nothing = grade_code(("print(3)", "stop", SUM), LIMITS)
    assert (nothing.reward, nothing.is_formatted, nothing.extracted) == (0.0, False, None)


def test_functions_are_called_with_arguments() -> None:
    reference = calls("add", ("1\n[2, 3]", "[3, 4]"), ("0\n[]", "[]"))
    body = "return [x + y for y in ys]"
    assert grade(f"def add(x, ys):\n    {body}", reference).reward == 1.0
    head = "def add(self, x: int, ys: List[int]) -> List[int]"
    method = f"class Solution:\n    {head}:\n        print('noise')\n        {body}"
    assert grade(method, reference).reward == 1.0
    assert grade("def add(x, ys): return ys", reference).reward == 0.0
    assert grade("def other(x, ys): return ys", reference).reward == 0.0
    main = f"def add(x, ys):\n    {body}\nif __name__ == '__main__':\n    print(add(int(input()), []))"
    assert grade(main, reference).reward == 1.0


def test_a_program_out_of_time_is_told_from_a_wrong_one() -> None:
    slow = grade("import time\ntime.sleep(30)", limits=Limits(wall_s=0.5))
    assert (slow.reward, slow.timed_out) == (0.0, True)
    assert grade("print(4)").timed_out is False


@pytest.mark.parametrize(
    "program",
    [
        # The expected outputs must be nowhere in reach.
        "import os\nfor root, _, files in os.walk('/tmp'):\n    for f in files: print(open(root + '/' + f).read())",
        "import gc\nprint([o for o in gc.get_objects() if 'output' in repr(o)[:99]])",
        "class Same(str):\n    __eq__ = lambda a, b: True\nprint(Same('x'))",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "print('3')\nprint('11')",
    ],
)
def test_cheats_are_not_rewarded(program: str) -> None:
    assert grade(program).reward == 0.0


def test_functions_that_cheat_are_not_rewarded() -> None:
    reference = calls("f", ("1", "[7, 8]"))
    for program in (
        "class Same(list):\n    __eq__ = lambda a, b: True\ndef f(x): return Same()",
        "import sys\ndef f(x):\n    print('[7, 8, 9]')\n    sys.exit(0)",
        "def f(x): return {7, 8}",
        "def f(x): return '[7, 8]'",
    ):
        assert grade(program, reference).reward == 0.0


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (response("print(1)"), "print(1)\n"),
        ("```py\nfirst\n``` then <answer>```\nsecond\n```</answer>", "second\n"),
        ("```python\nfirst\n```\nor\n```python\nlast\n```", "last\n"),
        ("```python\nfirst\n```\noutput:\n```text\n3\n```", "first\n"),
        ("```python\nfirst\n```\n<answer>42</answer>", None),
        ("```python\nunclosed", None),
        ("```python\n\n```", None),
        ("no code", None),
    ],
)
def test_extracted_programs(text: str, program: str | None) -> None:
    assert extract_program(text) == program


@pytest.mark.parametrize(
    ("output", "expected", "is_same"),
    [
        ("3\n", "3", True),
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("0.50", "0.5", True),
        ("1e3", "1000", True),
        ("1 2", "1\n2", False),
        ("Yes", "YES", False),
        ("3 4", "3", False),
        ("", "0", False),
        ("nan", "nan", True),
    ],
)
def test_outputs_are_compared_by_words_and_lines(output: str, expected: str, is_same: bool) -> None:
    assert same_output(output, expected) is is_same


@pytest.mark.parametrize(
    ("output", "expected", "is_same"),
    [
        ("[1, 2]", "[1,2]", True),
        ("1.0", "1", True),
        ('{"a": [true]}', '{"a": [true]}', True),
        ("true", "1", False),
        ("[1]", "[true]", False),
        ("[2, 1]", "[1, 2]", False),
        ("", "null", False),
        ("[" * 10**5, "1", False),
    ],
)
def test_values_are_compared_as_json(output: str, expected: str, is_same: bool) -> None:
    assert same_value(output, expected) is is_same


def test_a_reference_in_another_form_is_named() -> None:
    for reference in ("42", "{}", '{"tests": [1]}', '{"tests": [{"input": "1"}]}', "[]", "not JSON"):
        with pytest.raises(ValueError, match="of a program is not"):
            CodeTests.from_json(reference)
