"""The program of a verifier process: compares one pair of answers after another with math-verify.

    python math_worker.py <file descriptor of a connection> <timeout_s> <memory_gib>

It is run by its path and imports nothing of this package, hence neither torch nor the script that started
the training: a process is cheap to start and small. It may be killed at any moment.

The answers come from a model, and the parsers they go through are large: once these are loaded the process gives up
what it does not need. Memory and open files are limited, nothing can be written, and where the kernel grants it to
ordinary users there is no network, and no file can be made, renamed or removed.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

WRONG_ANSWER = "\\frac{1234577}{89}"
"""An expression must be told from this number."""

MAX_OPEN_FILES = 64

_LIBC = ctypes.CDLL(None)
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
# Of landlock's rights to files, in the order of its bits: all that change a file or a directory.
_LANDLOCK_WRITES = 1 << 1 | sum(1 << bit for bit in range(4, 13))


def main(descriptor: int, timeout_s: float, memory_gib: float) -> None:
    """Receives [answer, reference] as JSON, sends whether they are equal; ends when the connection is closed.

    Without a reference, sends whether the answer is an expression that equals itself, and not any other. The first
    message it sends holds the protections that the kernel refused.
    """
    connection = Connection(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the connection.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # An alarm ends the process, also inside a C function.
    limit_resources(int(memory_gib * 2**30))

    equal, is_expression = load_comparison()
    equal("\\frac{1}{2}", "0.5")  # The parser builds its tables on first use, before any deadline runs.
    silence()
    connection.send_bytes(json.dumps(confine()).encode())
    while True:
        try:
            answer, reference = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # The parent kills a comparison past its deadline; should the parent be gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 5)
        verdict = is_expression(answer) if reference is None else equal(answer, reference)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(verdict).encode())


def limit_resources(memory_bytes: int) -> None:
    """Lowers the limits of this process, or leaves those that are lower yet."""
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (limit, limit))


def confine() -> list[str]:
    """Gives up writing to files, making them, and the network, for good; returns which of these the kernel refused."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, and need not end the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    refused = []
    if _LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        refused.append("network")
    ruleset = struct.pack("Q", _LANDLOCK_WRITES)
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    descriptor = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    if descriptor < 0 or _LIBC.syscall(_LANDLOCK_RESTRICT_SELF, descriptor, 0) != 0:
        refused.append("files")
    return refused


def load_comparison() -> tuple[Callable[[str, str], bool], Callable[[str], bool]]:
    """Functions (answer, reference) -> bool and answer -> bool. math-verify's own timeouts need SIGALRM and are off."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Only LaTeX, and all of the box: the looser patterns pick a number out of a sentence.
    patterns = [LatexExtractionConfig(boxed_match_priority=0)]

    @functools.lru_cache(maxsize=1024)
    def parse_box(text: str) -> list[Any]:
        parsed: list[Any] = parse(f"\\boxed{{{text}}}", patterns, parsing_timeout=None)
        return parsed

    def equal(answer: str, reference: str) -> bool:
        left, right = parse_box(answer), parse_box(reference)
        if left and right and surely_different(left[0], right[0]):
            return False
        return bool(verify(right, left, timeout_seconds=None))

    def is_expression(answer: str) -> bool:
        parsed = parse_box(answer)
        # What the parser cannot read it returns as text, which would equal nothing but its own copy.
        if not parsed or isinstance(parsed[0], str):
            return False
        return bool(verify(parsed, parsed, timeout_seconds=None)) and not equal(WRONG_ANSWER, answer)

    return equal, is_expression


def surely_different(left: Any, right: Any) -> bool:
    """Whether two elementary expressions have different values at some point, which settles it.

    That is an order of magnitude faster than failing to simplify their difference to zero. The tolerance is
    above math-verify's own, which rounds to six decimals.
    """
    import sympy  # type: ignore[import-untyped]

    elementary = (
        *(sympy.Add, sympy.Mul, sympy.Pow, sympy.Number, sympy.NumberSymbol, sympy.Symbol, type(sympy.I)),
        *(sympy.exp, sympy.log, sympy.functions.elementary.trigonometric.TrigonometricFunction),
    )
    nodes = [node for side in (left, right) for node in sympy.preorder_traversal(side)]
    # math-verify compares a lone symbol by its letters.
    if not all(isinstance(node, elementary) for node in nodes) or left.is_Symbol or right.is_Symbol:
        return False
    names = sorted({node.name for node in nodes if node.is_Symbol})
    values = {name: 0.5 + (number * 0.6180339887) % 1 for number, name in enumerate(names, start=1)}
    try:
        x, y = (
            complex(side.evalf(subs={symbol: values[symbol.name] for symbol in side.free_symbols}))
            for side in (left, right)
        )
    except Exception:  # sympy raises almost anything on odd input, and math-verify knows how to cope
        return False
    return abs(x - y) > 1e-5 * max(1.0, abs(x), abs(y))


def silence() -> None:
    """Discards what the parser prints from here on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
