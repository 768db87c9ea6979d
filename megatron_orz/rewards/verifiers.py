"""One verifier for answers of every kind: values, letters of options, programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from megatron_orz.closeable import Closeable
from megatron_orz.rewards.choice import grade_choice
from megatron_orz.rewards.code import grade_code
from megatron_orz.rewards.confinement import Limits
from megatron_orz.rewards.math_answer import Response, Verifier
from megatron_orz.types import AnswerKind, Grade

_CODE_MEMORY_GIB = 2.0
_WALL_RATIO = 4.0


class AnswerVerifier(Closeable):
    """Grades responses by the kind of their reference. Processes start when an answer needs one. A context manager.

    timeout_s: deadline of one comparison, and the processor time of a program in one test. Its wall time is longer, so
    that a busy machine does not make right programs wrong.
    """

    def __init__(self, *, timeout_s: float = 5.0, num_workers: int = 2) -> None:
        self._stack = ExitStack()
        self._math = self._stack.enter_context(Verifier(timeout_s=timeout_s, num_workers=num_workers))
        self._programs = ThreadPoolExecutor(num_workers, thread_name_prefix="programs")
        self._limits = Limits(wall_s=_WALL_RATIO * timeout_s, cpu_s=timeout_s, memory_gib=_CODE_MEMORY_GIB)

    def grade(
        self,
        kinds: Sequence[AnswerKind],
        responses: Sequence[Response],
        *,
        on_grade: Callable[[], None] | None = None,
    ) -> list[Grade]:
        """The grades, in order. on_grade: called once for every response when its verdict is known."""
        advance = on_grade or (lambda: None)
        grades: dict[int, Grade] = {}
        of_kind: dict[AnswerKind, list[int]] = {"math": [], "choice": [], "code": []}
        for index, (kind, _) in enumerate(zip(kinds, responses, strict=True)):
            of_kind[kind].append(index)

        runs: dict[Future[Grade], int] = {
            self._programs.submit(grade_code, responses[index], self._limits): index for index in of_kind["code"]
        }
        for index in of_kind["choice"]:
            grades[index] = grade_choice(responses[index])
            advance()
        values = self._math.grade([responses[index] for index in of_kind["math"]], on_grade=on_grade)
        grades.update(zip(of_kind["math"], values, strict=True))
        for run, index in runs.items():
            grades[index] = run.result()
            advance()
        return [grades[index] for index in range(len(responses))]

    def close(self) -> None:
        """Ends the processes, after the comparisons and the tests that are running."""
        self._programs.shutdown(cancel_futures=True)
        self._stack.close()
