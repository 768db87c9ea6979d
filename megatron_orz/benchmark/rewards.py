"""Benchmarks the verifier: responses a second, beside math-verify called in the process itself, and TRL's reward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.host_work import HostTask
from megatron_orz.benchmark.measure import Run
from megatron_orz.benchmark.options import check_positive
from megatron_orz.rewards.math_answer import Response
from megatron_orz.rewards.verifiers import AnswerVerifier

IN_PROCESS, TRL = "math-verify, in process", "TRL, accuracy_reward"


@dataclass(frozen=True)
class Arguments:
    """Times the grading of responses whose answers are integers, fractions, roots and sets, right or wrong.

    Ours decides equal text and plain numbers on the spot, and asks math-verify for the rest in processes that can be
    killed. The others run math-verify for every response, in the process itself. Verdicts are compared first.
    """

    num_responses: int = 512
    """To grade."""
    integer_share: float = 0.5
    """Of the references; the others need symbols."""
    response_words: int = 300
    """Words before the answer."""
    num_workers: int = 2
    """Verifier processes of ours."""
    repeats: int = 3
    """Timed runs of each implementation, after one to warm up."""
    output: Path | None = None
    """Where the figures go; by default bench/results/<device>-rewards.json."""

    def __post_init__(self) -> None:
        check_positive(self, "num_responses", "num_workers", "repeats")
        if not 0 <= self.integer_share <= 1:
            raise ValueError(f"integer_share {self.integer_share} is no share; give a number from 0 to 1")


def run(arguments: Arguments, console: Console | None = None) -> Path:
    """Prints the table; returns the path of the results file. Raises RuntimeError where the verdicts differ."""
    items = make_responses(arguments, seed=0)
    with AnswerVerifier(num_workers=arguments.num_workers) as verifier:
        task = host_task(items, verifier, arguments)
        times = task.measure(arguments.repeats)
    return task.publish(times, asdict(arguments), arguments.output, console or Console())


def host_task(items: Sequence[Response], verifier: AnswerVerifier, arguments: Arguments) -> HostTask:
    """All implementations, on the same responses; they agree."""
    runs: dict[str, Run] = {OURS: partial(ours, verifier, items), IN_PROCESS: partial(in_process, items)}
    notes = {OURS: f"{arguments.num_workers} processes"}
    try:
        from trl.rewards import accuracy_reward

        completions = [[{"role": "assistant", "content": text}] for text, _, _ in items]
        runs[TRL] = partial(accuracy_reward, completions, [rf"\boxed{{{reference}}}" for _, _, reference in items])
    except ImportError:
        notes[TRL] = "not installed: pip install megatron_orz[benchmark]"
    verdicts = {name: list(run()) for name, run in runs.items()}
    for name, of_name in verdicts.items():
        if of_name != verdicts[OURS]:
            index = next(i for i, (a, b) in enumerate(zip(of_name, verdicts[OURS], strict=True)) if a != b)
            text, _, reference = items[index]
            raise RuntimeError(f"{name} and ours disagree on {text[-60:]!r} for {reference!r}; nothing was timed")
    return HostTask(
        task="rewards",
        shape=f"{len(items)} responses, {arguments.integer_share:.0%} integers",
        num_items=len(items),
        unit="responses",
        runs=runs,
        notes=notes,
        baselines=(IN_PROCESS, TRL),
    )


def make_responses(arguments: Arguments, *, seed: int) -> list[Response]:
    """Finished responses in the recipe's form, every other one right."""
    rng = random.Random(seed)
    items: list[Response] = []
    for index in range(arguments.num_responses):
        reference, wrong = _integers(rng) if rng.random() < arguments.integer_share else _symbols(rng)
        answer = reference if index % 2 else wrong
        words = " ".join(
            rng.choices(("so", "then", "we", "add", "both", "sides", "and", "get"), k=arguments.response_words)
        )
        text = rf"{words} </think> <answer> \boxed{{{answer}}} </answer>"
        items.append((text, "stop", reference))
    return items


def _integers(rng: random.Random) -> tuple[str, str]:
    value = rng.randint(0, 999)
    return str(value), str(value + 1)


def _symbols(rng: random.Random) -> tuple[str, str]:
    """A reference that plain text does not settle, and another value."""
    a, b = rng.randint(2, 9), rng.choice((3, 7, 11))
    forms = (
        (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a + 1}}}{{{b}}}"),
        (rf"{a}\sqrt{{{b}}}", rf"{a + 1}\sqrt{{{b}}}"),
        (rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a + 1}\pi}}{{{b}}}"),
    )
    return rng.choice(forms)


def ours(verifier: AnswerVerifier, items: Sequence[Response]) -> list[float]:
    """The rewards, by the verifier of a run."""
    return [grade.reward for grade in verifier.grade(["math"] * len(items), items)]


def in_process(items: Sequence[Response]) -> list[float]:
    """The rewards, by math-verify as its documentation calls it, without deadlines."""
    from math_verify import parse, verify

    return [
        float(
            verify(
                parse(rf"\boxed{{{reference}}}", parsing_timeout=None),
                parse(text, parsing_timeout=None),
                timeout_seconds=None,
            )
        )
        for text, _, reference in items
    ]
