"""A data file as a benchmark: its items, rendered and tokenised, and which rows are none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_orz.data.prompts import render
from megatron_orz.data.reading import Problem, RowError, read_rows
from megatron_orz.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One problem as it is asked."""

    key: str
    """A digest of the problem and its answer."""
    problem: Problem
    prompt: Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """The items of one file, in its order."""

    name: str
    path: Path
    items: tuple[Item, ...]
    dropped: tuple[str, ...]
    """A sentence for each row that is no item: which one, why, and what to do."""

    def __str__(self) -> str:
        return f"{self.name}: {len(self.items)} items, {len(self.dropped)} rows left out"


def load_benchmark(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    problem_column: str = "question",
    answer_column: str = "answer",
    option_seed: int = 0,
    max_items: int | None = None,
    is_strict: bool = False,
) -> Benchmark:
    """Every good row of a file; the others are left out and named.

    max_items: only the first of them. is_strict: a bad row is an error.
    Raises ValueError when no row is left.
    """
    problems: dict[str, Problem] = {}
    dropped: list[str] = []
    num_rows = 0
    rows = read_rows(path, problem_column=problem_column, answer_column=answer_column, option_seed=option_seed)
    for row in rows:
        num_rows += 1
        if isinstance(row, RowError):
            if is_strict:
                raise row
            dropped.append(str(row))
        elif (key := item_key(row)) in problems:
            dropped.append(f"{row.place}: the same as {problems[key].place}; remove one")
        else:
            problems[key] = row

    # Tokenising megabytes can take minutes; what is longer than so many of the longest token need not be tokenised.
    max_chars = max_prompt_tokens * max(map(len, tokenizer.get_vocab()))
    items = []
    for number, (key, problem) in enumerate(problems.items()):
        text = render(template, problem.text, bos_token=tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if len(text) <= max_chars else None
        if ids is None or len(ids) > max_prompt_tokens:
            length = f"{len(text)} characters" if ids is None else f"{len(ids)} tokens"
            rule = f"{length} exceed max_prompt_tokens {max_prompt_tokens}; raise it, or shorten the problem"
            dropped.append(f"{problem.place}: {rule}")
            continue
        prompt = Prompt(prompt_id=number, token_ids=ids, answer=problem.answer, source=path.name, kind=problem.kind)
        items.append(Item(key=key, problem=problem, prompt=prompt))
    if not items:
        first = f", the first of them: {dropped[0]}" if dropped else ""
        raise ValueError(f"{path}: none of its {num_rows} rows can be asked and graded{first}; see docs/evaluation.md")
    return Benchmark(name=path.stem, path=path, items=tuple(items[:max_items]), dropped=tuple(dropped))


def item_key(problem: Problem) -> str:
    """The digest that names an item in every run on it."""
    return hashlib.sha256(f"{problem.text}\0{problem.answer}".encode()).hexdigest()[:16]
