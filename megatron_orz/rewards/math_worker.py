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
from multiprocessing.connection import Connection
from typing import Any


def main(descriptor: int, timeout_s: float, memory_gib: float) -> None:
    """Receives (answer, reference), sends whether they are equal; ends when the connection is closed."""
    connection = Connection(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the connection.
    memory_bytes = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    equal = load_comparison()
    connection.send("ready")
    silence()
    while True:
        try:
            answer, reference = connection.recv()
        except EOFError:
            return
        # The parent kills a comparison past its deadline; should the parent be gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 5)
        verdict = equal(answer, reference)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


def load_comparison() -> Any:
    """A function (answer, reference) -> bool. math-verify's own timeouts need SIGALRM and are turned off."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Only LaTeX, and all of the box: the looser patterns pick a number out of a sentence.
    patterns = [LatexExtractionConfig(boxed_match_priority=0)]

    @functools.lru_cache(maxsize=1024)
    def parse_box(text: str) -> list[Any]:
        parsed: list[Any] = parse(f"\\boxed{{{text}}}", patterns, parsing_timeout=None)
        return parsed

    def equal(answer: str, reference: str) -> bool:
        return bool(verify(parse_box(reference), parse_box(answer), timeout_seconds=None))

    return equal


def silence() -> None:
    """Discards what the parser prints from here on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
