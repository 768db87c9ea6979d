"""The program of a verifier process: compares one pair of answers after another with math-verify.

    python math_worker.py <file descriptor of a connection> <timeout_s> <memory_gib>

It is run by its path and imports nothing of this package, hence neither torch nor the script that started
the training: a process is cheap to start and small. It may be killed at any moment.
"""

from __future__ import annotations

import functools
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

WRONG_ANSWER = "\\frac{1234577}{89}"
"""An expression must be told from this number."""


def main(descriptor: int, timeout_s: float, memory_gib: float) -> None:
    """Receives (answer, reference), sends whether they are equal; ends when the connection is closed.

    Without a reference, sends whether the answer is an expression that equals itself, and not any other.
    """
    connection = Connection(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the connection.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # An alarm ends the process, also inside a C function.
    limit_memory(int(memory_gib * 2**30))

    equal, is_expression = load_comparison()
    equal("\\frac{1}{2}", "0.5")  # The parser builds its tables on first use, before any deadline runs.
    connection.send("ready")
    silence()
    while True:
        try:
            answer, reference = connection.recv()
        except EOFError:
            return
        # The parent kills a comparison past its deadline; should the parent be gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 5)
        verdict = is_expression(answer) if reference is None else equal(answer, reference)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


def limit_memory(num_bytes: int) -> None:
    """Lowers the address space of this process to `num_bytes`, or leaves a limit that is lower yet."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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
