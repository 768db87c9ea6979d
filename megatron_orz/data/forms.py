"""The forms in which benchmarks with options or with tests are published, known by the columns of a row.

GPQA            Question, Correct Answer, Incorrect Answer 1 to 3; the options are shuffled
LiveCodeBench   question_content, starter_code, public_test_cases, private_test_cases, metadata
MMLU, MMLU-Pro  question, choices (or options), answer (a letter, or an index from 0)
code            question, tests (objects with `input` and `output`), and function where they are arguments
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, TypeAlias

from megatron_orz.types import AnswerKind

Row: TypeAlias = Mapping[str, Any]
Fields: TypeAlias = tuple[str, str, AnswerKind]
"""The problem's text, the reference answer, and how it is graded."""

_MAX_TESTS_BYTES = 256 * 2**20
_STRING_OPCODES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_OTHER_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One form: rows that have all of `columns` are read by `read(row, option_seed)`, which raises ValueError."""

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    read: Callable[[Row, int], Fields]


def find_form(row: Row) -> Form | None:
    """The first form whose columns the row has."""
    return next((form for form in FORMS if all(column in row for column in form.columns)), None)


def choice_text(question: str, options: Sequence[str]) -> str:
    """The question, its options with their letters, and what is asked for."""
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"it has {len(options)} options, and needs 2 to {len(ascii_uppercase)}")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return f"{question}\n\n{listed}\n\nAnswer with the letter of the right option."


def code_text(question: str, starter_code: str, function: str | None) -> str:
    """The question, the code to begin with, and what is asked for."""
    task = f"defines {function}" if function else "reads standard input and writes standard output"
    start = f"\n\nBegin with this code:\n```python\n{starter_code}\n```" if starter_code.strip() else ""
    return f"{question}{start}\n\nWrite Python that {task}, as one ```python block inside the <answer> tags."


def tests_text(tests: Any, function: Any) -> str:
    """The reference of a program, as JSON: `{"function": name or null, "tests": [{"input", "output"}, ...]}`.

    Raises ValueError for what is no name, or no tests.
    """
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise ValueError(f"its function {str(function)[:40]!r} is no name")
    if not isinstance(tests, list) or not tests:
        raise ValueError("it has no tests")
    if not all(
        isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)
        for test in tests
    ):
        raise ValueError('its tests are not all objects with the texts "input" and "output"')
    pairs = [{"input": test["input"], "output": test["output"]} for test in tests]
    return json.dumps({"function": function, "tests": pairs})


def check_reference(kind: AnswerKind, answer: str) -> None:
    """Raises ValueError for an answer that responses of its kind cannot be graded by."""
    if kind == "choice" and (len(answer) != 1 or answer.upper() not in ascii_uppercase):
        raise ValueError(f"the answer {answer[:40]!r} of kind choice is not the letter of an option")
    if kind == "code":
        fields = json.loads(answer)
        if not isinstance(fields, dict):
            raise ValueError('the answer of kind code is not {"function": ..., "tests": [...]}')
        tests_text(fields.get("tests"), fields.get("function"))


def _read_gpqa(row: Row, option_seed: int) -> Fields:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    question, *options = (_string(row, name) for name in ("Question", *names))
    order = list(range(len(options)))
    random.Random(f"{option_seed}:{question}").shuffle(order)
    return choice_text(question, [options[index] for index in order]), ascii_uppercase[order.index(0)], "choice"


def _read_choice(row: Row, option_seed: int) -> Fields:
    options = row.get("choices", row.get("options"))
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("its options are not a list of texts")
    text, answer = choice_text(_string(row, "question"), options), row["answer"]
    letters = ascii_uppercase[: len(options)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return text, letters[answer], "choice"
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return text, answer.strip().upper(), "choice"
    raise ValueError(f"its answer {str(answer)[:40]!r} is neither a letter of its {len(options)} options nor an index")


def _read_code(row: Row, option_seed: int) -> Fields:
    function, starter_code = row.get("function") or None, row.get("starter_code") or ""
    reference = tests_text(row["tests"], function)
    return code_text(_string(row, "question"), str(starter_code), function), reference, "code"


def _read_live_code_bench(row: Row, option_seed: int) -> Fields:
    public = json.loads(_string(row, "public_test_cases"))
    private = json.loads(_private_tests(_string(row, "private_test_cases")))
    metadata = json.loads(_string(row, "metadata")) if row["metadata"] else {}
    if not (isinstance(public, list) and isinstance(private, list) and isinstance(metadata, dict)):
        raise ValueError("its tests are no lists, or its metadata is no object")
    return _read_code(
        {
            "question": row["question_content"],
            "starter_code": row["starter_code"],
            "function": metadata.get("func_name"),
            "tests": [*public, *private],
        },
        option_seed,
    )


def _private_tests(text: str) -> str:
    """JSON as it stands, or base64 of zlib of a pickle of it. The pickle is taken apart and never executed."""
    if text.lstrip().startswith("["):
        return text
    try:
        unpack = zlib.decompressobj()
        raw = unpack.decompress(base64.b64decode(text, validate=True), _MAX_TESTS_BYTES)
        opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(raw)]
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"its private tests are neither JSON nor compressed ({error})") from error
    strings = [argument for name, argument in opcodes if name in _STRING_OPCODES]
    if unpack.unconsumed_tail or len(strings) != 1 or {name for name, _ in opcodes} - _STRING_OPCODES - _OTHER_OPCODES:
        raise ValueError("its private tests are not one text")
    return str(strings[0])


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {column} is empty or no text")
    return value


FORMS = (
    Form(
        name="GPQA",
        columns=("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        read=_read_gpqa,
    ),
    Form(
        name="LiveCodeBench",
        columns=("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        read=_read_live_code_bench,
    ),
    Form(name="MMLU", columns=("question", "choices", "answer"), read=_read_choice),
    Form(name="MMLU-Pro", columns=("question", "options", "answer"), read=_read_choice),
    Form(name="code", columns=("question", "tests"), optional=("function", "starter_code"), read=_read_code),
)
COLUMNS = tuple(dict.fromkeys(column for form in FORMS for column in (*form.columns, *form.optional)))
"""Every column that some form reads."""
