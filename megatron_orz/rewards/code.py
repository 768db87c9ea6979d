"""Programs as answers: taken from the response, run in the sandbox on one test after another.

A test is an input and an output: what the program reads and writes or, where a function is asked for, its arguments as
JSON, one a line, and what it returns. The outputs never enter the sandbox, so that a program cannot read them.
"""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from megatron_orz.rewards.confinement import Limits
from megatron_orz.rewards.math_answer import Response
from megatron_orz.rewards.sandbox import run_python
from megatron_orz.types import Grade

_PYTHON = ("python", "python3", "py", "")

# What stands before and after a program of which a function is asked. What the program prints is no answer.
_BEFORE = """\
import json as _json, os as _os, sys as _sys
from typing import *
import bisect, collections, functools, heapq, itertools, math
_arguments = [_json.loads(line) for line in _sys.stdin.read().splitlines() if line.strip()]
_answer = _os.fdopen(_os.dup(1), "w")
_os.dup2(2, 1)
__name__ = "solution"
"""
_AFTER = """
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else {name}
_json.dump(_function(*_arguments), _answer)
_answer.close()
"""


class CodeTest(NamedTuple):
    """What goes in and what must come out."""

    input: str
    output: str


class CodeTests(NamedTuple):
    """The reference of a program."""

    function: str | None
    """Called with the input's arguments, also as a method of a class `Solution`; None runs the program itself."""
    tests: tuple[CodeTest, ...]

    @classmethod
    def from_json(cls, reference: str) -> CodeTests:
        """From `{"function": name or null, "tests": [{"input": ..., "output": ...}, ...]}`. Raises ValueError."""
        try:
            fields = json.loads(reference)
            tests = tuple(CodeTest(str(test["input"]), str(test["output"])) for test in fields["tests"])
            return cls(fields.get("function"), tests)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the reference {reference[:80]!r} of a program is not "
                '{"function": name or null, "tests": [{"input": ..., "output": ...}, ...]}; correct its row'
            ) from error


def extract_program(response: str) -> str | None:
    """The last closed block of Python between code fences: within the last <answer> where there is one."""
    blocks = response[max(response.rfind("<answer>"), 0) :].split("```")[1:-1:2]
    for block in reversed(blocks):
        language, _, program = block.partition("\n")
        if language.strip().lower() in _PYTHON and program.strip():
            return program
    return None


def grade_code(response: Response, limits: Limits) -> Grade:
    """Reward 1 for a program that passes every test, in a finished response. The first test it fails is the last."""
    text, finish_reason, reference = response
    program, tests = extract_program(text), CodeTests.from_json(reference)
    passed, timed_out = False, False
    if program is not None:
        for test in tests.tests:
            passed, timed_out = _run_test(program, tests.function, test, limits)
            if not passed:
                break
    return Grade(
        reward=1.0 if passed and finish_reason == "stop" else 0.0,
        is_correct=passed,
        is_formatted=program is not None,
        timed_out=timed_out,
        extracted=program,
    )


def _run_test(program: str, function: str | None, test: CodeTest, limits: Limits) -> tuple[bool, bool]:
    """Whether the program passes, and whether it ran out of time."""
    if function is not None:
        program = _BEFORE + program + _AFTER.format(name=function)
    outcome = run_python(program, stdin=test.input.encode(errors="replace"), limits=limits)
    if outcome.exit_code != 0:
        return False, outcome.timed_out
    output = outcome.stdout.decode(errors="replace")
    return (same_output if function is None else same_value)(output, test.output), False


def same_output(output: str, expected: str) -> bool:
    """Equal line by line but for white space at their ends; words may also be equal as decimal numbers."""
    left, right = ([line.split() for line in text.rstrip().splitlines()] for text in (output, expected))
    return len(left) == len(right) and all(
        len(words) == len(others) and all(map(_same_word, words, others))
        for words, others in zip(left, right, strict=True)
    )


def same_value(output: str, expected: str) -> bool:
    """Equal as JSON values: lists and tuples are alike, and 1 is 1.0 but not true."""
    try:
        return _normal(json.loads(output)) == _normal(json.loads(expected))
    except (ValueError, RecursionError):
        return False


def _normal(value: Any) -> Any:
    """The value with booleans that equal no number."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return value


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    try:
        return Decimal(word) == Decimal(expected)
    except InvalidOperation:
        return False
