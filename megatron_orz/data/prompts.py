"""From a file of problems to an endless, resumable stream of tokenised prompts.

read_problems(path) -> Problem --render--> text --tokenise--> Prompt --PromptStream--> take(n)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_orz.data.reading import read_problems
from megatron_orz.data.stream import EpochStream
from megatron_orz.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {
    "orz": (
        "{bos_token}A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the "
        "answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: You must put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. "
        "And your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "This is the problem:\n"
        "{problem}\n"
        "Assistant: <think>"
    ),
    "short": "User: {problem}\nAssistant: <think>",
}
"""The recipe's prompt, whose two layers are written here as one text, and a short one for tiny models."""


def resolve_template(template: str) -> str:
    """The text of a built-in template, or `template` itself when it holds `{problem}`."""
    text = TEMPLATES.get(template, template)
    if "{problem}" not in text:
        raise ValueError(
            f"template {template!r} is neither a built-in name ({', '.join(TEMPLATES)}) nor a text that holds "
            "{problem}; set data.template to one of them"
        )
    return text


def render(template: str, problem: str, *, bos_token: str | None = None) -> str:
    """The prompt's text. `{bos_token}` is filled where the template holds it, with nothing when there is none."""
    # The problem goes in last, and both by plain replacement: LaTeX is full of braces.
    return resolve_template(template).replace("{bos_token}", bos_token or "").replace("{problem}", problem)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What became of the rows of all files together."""

    num_read: int
    num_kept: int
    num_too_long: int
    """Dropped: the rendered prompt is longer than the limit."""

    def __str__(self) -> str:
        return f"{self.num_kept} prompts of {self.num_read} rows ({self.num_too_long} too long)"


def load_prompts(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    problem_column: str = "question",
    answer_column: str = "answer",
    max_prompts: int | None = None,
) -> tuple[list[Prompt], LoadReport]:
    """Every problem of the files, rendered and tokenised, without the ones that are too long.

    max_prompts: read only the first rows of each file.

    `prompt_id` counts the rows over all files in their order. A dropped row keeps its number, so the ids
    do not depend on the limits on length.
    """
    prompts: list[Prompt] = []
    num_read = 0
    for path in paths:
        rows = read_problems(path, problem_column=problem_column, answer_column=answer_column)
        problems = list(islice(rows, max_prompts))
        texts = [render(template, problem.text, bos_token=tokenizer.bos_token) for problem in problems]
        # The template already holds the bos token, so the tokenizer must not add another.
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        prompts += (
            Prompt(prompt_id=prompt_id, token_ids=ids, answer=problem.answer, source=path.name, kind=problem.kind)
            for prompt_id, (problem, ids) in enumerate(zip(problems, token_ids, strict=True), start=num_read)
            if len(ids) <= max_prompt_tokens
        )
        num_read += len(problems)
    if not prompts:
        raise ValueError(
            f"none of the {num_read} rows of {', '.join(map(str, paths))} fits max_prompt_tokens {max_prompt_tokens}; "
            "raise data.max_prompt_tokens"
        )
    return prompts, LoadReport(num_read=num_read, num_kept=len(prompts), num_too_long=num_read - len(prompts))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer can produce an id the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer's largest token id {largest} is not below the model's vocabulary size {vocab_size}; "
            "use the tokenizer of the model's own checkpoint directory"
        )


class PromptStream(EpochStream[Prompt]):
    """The prompts of a run, in the order in which its steps take them."""
