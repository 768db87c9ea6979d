"""Answers that attack the verifier: each costs bounded time, earns nothing, and touches nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_orz.rewards import math_worker
from megatron_orz.rewards.math_answer import MAX_ANSWER_CHARS, Verifier

TIMEOUT_S = 2.0
START_S = 45.0
"""What starting a process may take on a busy machine; a comparison may cost two of them."""

EASY_TO_REFUSE = {
    "input": r"\input{/etc/passwd}",
    "write18": r"\immediate\write18{touch pwned}",
    "substitution": "$(touch pwned)",
    "backticks": "`touch pwned`",
    "python": "7; import os; os.system('touch pwned')",
    "dunder": "__import__('os').system('touch pwned')",
    "subclasses": "().__class__.__bases__[0].__subclasses__()",
    "division by zero": "1/(1-1)^{1/(1-1)}",
    "hedge": "7 or 8",
    "list": "6,7",
    "plus or minus": r"\pm 7",
    "interval": "[6,8]",
    "everything": r"(-\infty,\infty)",
    "reals": r"\mathbb{R}",
    "not equal": r"\neq 8",
    "bound": r"x \le 7",
    "nan": r"\mathrm{nan}",
    "full-width digit": "\uff17",
    "arabic digit": "\u0667",
    "superscript digit": "\u2077",
    "circled digit": "\u2466",
    "bold digit": "\U0001d7d5",
    "roman numeral": "\u2166",
    "zero-width space": "\u200b7",
    "right-to-left override": "\u202e7",
    "byte order mark": "\ufeff7",
    "combining stroke": "7\u0336",
    "null": "\x007",
    "lone surrogate": "7\ud800",
    "overlong": "7" + "+0" * MAX_ANSWER_CHARS,
    "a megabyte": "7" + " " * 2**20 + ".",
}
"""None of them equals 7."""

BOMBS = {
    "tower": "9^{9^{9^9}}",
    "tower of powers": "9**9**9",
    "factorial": "100000000!",
    "factorials": "((((9!)!)!)!)",
    "binomial": r"\binom{10^9}{10^8}",
    "roots": "\\sqrt{" * 140 + "2" + "}" * 140,
    "fractions": "\\frac{1}{" * 100 + "0" + "}" * 100,
    "parentheses": "(" * 450 + "1" + ")" * 450,
    "braces": "{" * 480 + "1" + "}" * 480,
    "minuses": "-" * 499 + "7",
    "slashes": "7/" * 200 + "1",
    "indices": "a_" * 300 + "1",
    "sum": r"\sum_{n=1}^{10^{12}} n",
    "product": r"\prod_{n=1}^{10^8} n",
    "integral": r"\int_0^1 x^{x^{x^x}} dx",
    "polynomial": "(x+y+z+w)^{200}",
    "sines": "\\sin(" * 100 + "x" + ")" * 100,
    "exponentials": "e^{" * 100 + "1" + "}" * 100,
    "gamma": r"\Gamma(10^8)",
    "matrix": r"\begin{pmatrix}" + "1&" * 400 + r"1\end{pmatrix}",
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=TIMEOUT_S, num_workers=2) as verifier:
        yield verifier


def check_refused(verifier: Verifier, answers: dict[str, str]) -> None:
    start = time.monotonic()
    grades = verifier.grade([(f"<answer>\\boxed{{{answer}}}</answer>", "stop", "7") for answer in answers.values()])
    elapsed_s = time.monotonic() - start
    assert [name for name, grade in zip(answers, grades, strict=True) if grade.reward or grade.is_correct] == []
    # A comparison ends with its deadline, or with the end of two processes.
    assert elapsed_s < len(answers) * (2 * TIMEOUT_S + START_S) / 2 + START_S


def test_tricks_earn_nothing(verifier: Verifier) -> None:
    check_refused(verifier, EASY_TO_REFUSE)
    assert not Path("pwned").exists()


@pytest.mark.slow
def test_bombs_earn_nothing_and_cost_their_deadline(verifier: Verifier) -> None:
    check_refused(verifier, BOMBS)


def test_a_megabyte_costs_nothing(verifier: Verifier) -> None:
    start = time.process_time()
    [grade] = verifier.grade([("<answer>\\boxed{" + "7+" * 2**19 + "0}</answer>", "stop", "7")])
    assert (grade.reward, grade.timed_out) == (0.0, False)
    assert time.process_time() - start < 1.0


ESCAPES = """
import importlib.util, json, os, resource, socket, sys
from pathlib import Path

specification = importlib.util.spec_from_file_location("math_worker", sys.argv[1])
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)
worker.limit_resources(2**30)
refused = worker.confine()

def tries(action):
    try:
        action()
    except OSError as error:
        return False
    return True

def listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), 5).close()

print(json.dumps({
    "refused": refused,
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "read": tries(lambda: Path("victim").read_text()),
    "write": tries(lambda: Path("victim").write_text("x")),
    "create": tries(lambda: Path("new").touch()),
    "mkdir": tries(lambda: os.mkdir("directory")),
    "rename": tries(lambda: os.rename("victim", "moved")),
    "remove": tries(lambda: os.remove("victim")),
    "link": tries(lambda: os.link("victim", "link")),
    "connect": tries(listens),
    "child writes": os.system("echo x > child") == 0,
    "sockets of the machine": tries(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 5)),
}))
"""


def test_a_confined_process_writes_nothing_and_reaches_nobody(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", ESCAPES, math_worker.__file__, str(server.getsockname()[1])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert found["core"] == 0
    assert found["read"]
    assert not found["write"]
    if "files" not in found["refused"]:
        assert not any(found[action] for action in ("create", "mkdir", "rename", "remove", "link", "child writes"))
        assert {file.name for file in tmp_path.iterdir()} == {"victim"}
    if "network" not in found["refused"]:
        assert not found["connect"]
        assert not found["sockets of the machine"]
    assert (tmp_path / "victim").read_text() == "whole"
