r"""The rule-based reward: 1 for a right answer in a finished response, else 0.

    response --extract_answer--> answer --quick_verdict, else math-verify--> Grade

Equal strings and plain numbers are decided on the spot. Everything else goes to math-verify in processes of
its own, where an answer that sympy cannot digest costs its deadline and one process, and nothing more.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from functools import cache, lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from megatron_orz.closeable import Closeable
from megatron_orz.types import FinishReason, Grade

Response: TypeAlias = tuple[str, FinishReason, str]
"""What is graded: the response's text, how it ended, and the reference answer."""

MAX_ANSWER_CHARS = 1000
"""A longer answer equals only its own copy: math-verify's patterns are not linear in the length."""

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 60.0
_MEMORY_GIB = 2.0
"""Address space of a process."""
_MAX_MESSAGE_BYTES = 100

logger = logging.getLogger(__name__)


def extract_answer(response: str) -> str | None:
    r"""What the last balanced `\boxed{...}` holds within the text that the recipe's pattern matches, if anything.

    The pattern is `<answer>.*?(\\boxed{.*}).*?</answer>` with a dot that matches newlines: from the first box
    after the first `<answer>` to the last brace before the last `</answer>`. Scanning for these four places
    is linear in the length, which backtracking on a hostile text is not.
    """
    start = response.find("<answer>")
    box = response.find("\\boxed{", start)
    end = response.rfind("</answer>")
    brace = response.rfind("}", box, end)
    if -1 in (start, box, end, brace):
        return None
    return (_last_box(response[box : brace + 1]) or "").strip() or None


_BRACES = re.compile(r"\\?\\boxed\{|\\\\|\\[{}]|[{}]")


def _last_box(text: str) -> str | None:
    """The content of the balanced box that opens last. Escaped braces do not count."""
    opened: list[tuple[bool, int]] = []  # (is a box, where its content starts) of every open brace
    start, end = -1, -1
    for brace in _BRACES.finditer(text):
        if brace[0] == "}" and opened:
            is_box, content = opened.pop()
            if is_box and content > start:
                start, end = content, brace.start()
        elif brace[0].endswith("boxed{") or brace[0] == "{":
            opened.append((brace[0] != "{", brace.end()))
    return text[start:end] if start >= 0 else None


def quick_verdict(answer: str, reference: str) -> bool | None:
    """Whether the answers are equal as text or as plain numbers; None when that does not settle it."""
    if answer == reference:
        return True
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    answer, reference = _normalise(answer), _normalise(reference)
    if answer == reference:
        return True
    if (left := _number(answer)) is not None and (right := _number(reference)) is not None:
        return left == right
    # math-verify takes 40 % for 40, and yet not 12.5 % for 12.5.
    left, right = (_number(text.removesuffix("%").removesuffix("\\")) for text in (answer, reference))
    return True if left is not None and left == right else None


_SPACING = re.compile(r"\\[!,;: ]|\\left(?![a-z])|\\right(?![a-z])|(?<![0-9])\s+|\s+(?![0-9])")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf)\{([^{}]*)\}")


@lru_cache(maxsize=8192)
def _normalise(answer: str) -> str:
    """The same answer without what only changes its looks: spacing, dollars, `\\left`, `\\dfrac`, a text wrapper."""
    answer = _SPACING.sub("", answer.replace("\\$", "").lstrip("$ \n\t").rstrip("$. \n\t"))
    if text := _TEXT.fullmatch(answer):
        answer = text[1]
    return answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")


def _number(answer: str) -> Decimal | None:
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    return Decimal(answer) if _NUMBER.fullmatch(answer) else None


class Verifier(Closeable):
    """Grades responses, with processes that start when the first answer needs one. A context manager."""

    def __init__(self, *, timeout_s: float = 5.0, num_workers: int = 2) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [_Worker(timeout_s) for _ in range(num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="verifier")

    def close(self) -> None:
        """Ends the processes, after the comparisons that are running."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def grade(self, responses: Sequence[Response], *, on_grade: Callable[[], None] | None = None) -> list[Grade]:
        """The grades, in order. A pair of answer and reference that occurs often is compared once.

        on_grade: called once for every response when its verdict is known (progress bars).
        """
        pairs = [(extract_answer(text), reference) for text, _, reference in responses]
        counts = Counter(pairs)
        verdicts: dict[tuple[str | None, str], bool | None] = {}
        comparisons: dict[Future[bool | None], tuple[str | None, str]] = {}

        def settle(pair: tuple[str | None, str], verdict: bool | None) -> None:
            verdicts[pair] = verdict
            if on_grade is not None:
                for _ in range(counts[pair]):
                    on_grade()

        for pair in counts:
            answer, reference = pair
            verdict = False if answer is None else quick_verdict(answer, reference)
            if answer is None or verdict is not None:
                settle(pair, verdict)
            else:
                comparisons[self._threads.submit(self._compare, answer, reference)] = pair
        # In their order, as they are begun: `as_completed` would wait forever for those that `close` drops.
        for comparison, pair in comparisons.items():
            settle(pair, comparison.result())

        return [
            _grade(pair[0], verdicts[pair], finish_reason)
            for pair, (_, finish_reason, _) in zip(pairs, responses, strict=True)
        ]

    def recognise(self, answers: Sequence[str]) -> list[bool | None]:
        """Whether each answer can be told from others: a number, or an expression for math-verify.

        None where that takes past the deadline.
        """
        verdicts: list[bool | Future[bool | None] | None] = [
            self._threads.submit(self._compare, answer, None)
            if _number(_normalise(answer)) is None and len(answer) <= MAX_ANSWER_CHARS
            else len(answer) <= MAX_ANSWER_CHARS
            for answer in answers
        ]
        return [verdict.result() if isinstance(verdict, Future) else verdict for verdict in verdicts]

    def _compare(self, answer: str, reference: str | None) -> bool | None:
        worker = self._idle.get()
        try:
            return worker.compare(answer, reference)
        finally:
            self._idle.put(worker)


def _grade(answer: str | None, is_equal: bool | None, finish_reason: FinishReason) -> Grade:
    return Grade(
        reward=1.0 if is_equal and finish_reason == "stop" else 0.0,
        is_correct=bool(is_equal),
        is_formatted=answer is not None,
        timed_out=is_equal is None,
        extracted=answer,
    )


class _Worker:
    """One process of `math_worker.py`, started when it is needed and again after it died."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def compare(self, answer: str, reference: str | None) -> bool | None:
        """Whether the answers are equal, or without a reference whether the answer is an expression.

        None past the deadline, and for what ends two processes.
        """
        for _ in range(2):
            if self._process is None:
                self._start()
            try:
                self._connection.send_bytes(json.dumps([answer, reference]).encode())
                if self._connection.poll(self._timeout_s):
                    return self._receive() is True
            except (EOFError, OSError, ValueError):  # the process died, which need not be this pair's fault
                self.stop()
            else:
                self.stop()
                return None
        return None

    def _start(self) -> None:
        # A program of its own, not a fork or a spawn: threads and CUDA of the trainer do not survive a fork,
        # and multiprocessing's spawn would import the training script, and torch with it, in every process.
        self._connection, theirs = Pipe()
        with theirs:
            program = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
            arguments = [str(theirs.fileno()), str(self._timeout_s), str(_MEMORY_GIB)]
            self._process = subprocess.Popen(
                program + arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        try:
            refused = self._receive() if self._connection.poll(_START_TIMEOUT_S) else None
        except (EOFError, OSError, ValueError):
            refused = None
        if refused is None:
            self.stop()
            raise RuntimeError(
                f"a verifier process died while starting, or was not ready within {_START_TIMEOUT_S:.0f} s; see its "
                "message above, and check that `python -c 'import math_verify'` works"
            )
        if refused:
            _warn_of_weak_confinement(*refused)

    def _receive(self) -> Any:
        """JSON, not pickle: what reads a model's answers must not be able to run anything here."""
        return json.loads(self._connection.recv_bytes(_MAX_MESSAGE_BYTES))

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(_END_TIMEOUT_S)
            self._process = None
            self._connection.close()


@cache
def _warn_of_weak_confinement(*refused: str) -> None:
    logger.warning(
        "the kernel does not let verifier processes give up access to: %s; they keep their limits of time and memory",
        ", ".join(refused),
    )
