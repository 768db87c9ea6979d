r"""Arithmetic made to order: problems, partly wrong solutions for a base model, and a tokenizer to match.

A problem is a chain of small numbers, `7+8-3+9`. Its solution goes on where the `short` template stops,
after `<think>`:

    7+8=15
    15-3=12
    12+9=21</think><answer>\boxed{21}</answer>
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_orz.whole_file import whole_file


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """What the problems look like, and how often a demonstration goes wrong."""

    num_terms: tuple[int, int] = (3, 5)
    """Fewest and most numbers in a chain."""
    max_term: int = 9
    """Every number is between 1 and this."""
    step_error: float = 0.15
    """Probability that the total of a step is wrong; the later steps carry on from it."""
    format_error: float = 0.05
    """Probability that the answer's closing tag or its box is missing."""

    def __post_init__(self) -> None:
        fewest, most = self.num_terms
        if not 2 <= fewest <= most:
            raise ValueError(f"num_terms {self.num_terms} must be a range that starts at 2 or more")
        if self.max_term < 1:
            raise ValueError(f"max_term {self.max_term} is not at least 1")
        for name in ("step_error", "format_error"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1]")


def make_problems(task: ArithmeticTask, *, num_train: int, num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out problems, all different and alike in kind."""
    num_problems = num_train + num_held_out
    if num_problems > (available := count_problems(task)):
        raise ValueError(f"{num_problems} problems asked for, and only {available} exist; raise num_terms or max_term")
    rng = random.Random(seed)
    problems: dict[str, None] = {}  # a set that keeps its order
    while len(problems) < num_problems:
        problems[_draw_problem(task, rng)] = None
    shuffled = list(problems)
    rng.shuffle(shuffled)  # there are few short chains, and early draws find most of them
    return shuffled[num_held_out:], shuffled[:num_held_out]


def count_problems(task: ArithmeticTask) -> int:
    """How many different problems there are: chains whose running totals never fall below 0."""
    count = 0
    chains = Counter(dict.fromkeys(range(1, task.max_term + 1), 1))  # running total -> chains that end in it
    for length in range(2, task.num_terms[1] + 1):
        longer: Counter[int] = Counter()
        for total, number in chains.items():
            for term in range(1, task.max_term + 1):
                longer[total + term] += number
                if term <= total:
                    longer[total - term] += number
        chains = longer
        if length >= task.num_terms[0]:
            count += chains.total()
    return count


def _draw_problem(task: ArithmeticTask, rng: random.Random) -> str:
    total = rng.randint(1, task.max_term)
    text = str(total)
    for _ in range(rng.randint(*task.num_terms) - 1):
        term = rng.randint(1, task.max_term)
        sign = rng.choice("+-") if term <= total else "+"
        total = total + term if sign == "+" else total - term
        text += f"{sign}{term}"
    return text


def solve(problem: str) -> int:
    """The right answer: `solve("7+8-3+9") == 21`."""
    return sum(map(int, re.findall(r"[+-]?\d+", problem)))


def write_solution(problem: str, task: ArithmeticTask, rng: random.Random) -> str:
    """A worked solution that errs as often as the task says, and otherwise follows from its own steps."""
    first, *terms = re.findall(r"[+-]?\d+", problem)
    total = int(first)
    steps = []
    for term in terms:
        right = total + int(term)
        is_wrong = rng.random() < task.step_error
        written = _near_miss(right, rng) if is_wrong else right
        steps.append(f"{total}{term}={written}")
        total = written
    answer = f"<answer>\\boxed{{{total}}}</answer>"
    if rng.random() < task.format_error:
        answer = rng.choice([f"<answer>\\boxed{{{total}}}", f"<answer>{total}</answer>"])
    return "\n".join(steps) + "</think>" + answer


def _near_miss(right: int, rng: random.Random) -> int:
    """Another total, at most 3 away where that is not negative."""
    lowest = max(right - 3, 0)
    return rng.choice([total for total in range(lowest, max(right, lowest) + 4) if total != right])


def write_problems(path: Path, problems: Iterable[str]) -> None:
    """Writes the problems with their right answers as JSONL (`question`, `answer`); all of them or nothing."""
    _write_lines(path, ({"question": problem, "answer": str(solve(problem))} for problem in problems))


def write_conversations(path: Path, problems: Iterable[str], task: ArithmeticTask, *, seed: int) -> None:
    """Writes each problem and one solution of it as JSONL (`prompt`, `response`); all of them or nothing."""
    rng = random.Random(seed)
    _write_lines(path, ({"prompt": problem, "response": write_solution(problem, task, rng)} for problem in problems))


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


_WORDS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "User:", "Assistant:")
_END = "<|endoftext|>"


def build_tokenizer() -> PreTrainedTokenizerBase:
    r"""One token per byte, and one for each tag, `\boxed{`, `User:` and `Assistant:`.

    The tags are ordinary tokens, so decoding keeps them; `<|endoftext|>` ends a text and pads a batch.

    It is Qwen2's own tokenizer class without merges: beside a Qwen2 config.json, AutoTokenizer (and with it every
    server) loads that class whatever class saved the files, and reads other pre-tokenisers wrongly, without an error.
    """
    entries = [_END, *_WORDS, *bytes_to_unicode().values()]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, merges=[], eos_token=_END, pad_token=_END
    )
    tokenizer.add_tokens(list(_WORDS))
    return tokenizer
