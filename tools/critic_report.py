"""What a critic says of generations: an HTML page of coloured tokens, and whether it devalues repetition.

python tools/critic_report.py --critic runs/demo/final-critic --generations runs/demo --output report.html
python tools/critic_report.py --critic critic --generations runs/demo/generations/step-000012.parquet \\
    --output report.html --min-repeat-tokens 32 --show 100
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from rich.table import Table
from rich.text import Text

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, read_command
from megatron_orz.critic_analysis.contrast import CONFIDENCE, Contrast, contrasts
from megatron_orz.critic_analysis.page import contrast_cells, render_page
from megatron_orz.critic_analysis.values import ValuedResponse, load_critic, value_responses
from megatron_orz.generations import find_generations, read_generations
from megatron_orz.whole_file import whole_file


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Writes a page of what a critic says of generations, and compares repeated stretches with the rest."""

    critic: Path
    """A critic's Hugging Face checkpoint, such as a run's final-critic/."""
    generations: tuple[Path, ...]
    """Files of a run's generations/, or directories of runs: all their files."""
    output: Path
    """The page: one file, with nothing from outside."""
    min_repeat_tokens: int = 16
    """A stretch of at least so many tokens that began earlier in the response counts as repeated."""
    gamma: float = 1.0
    gae_lambda: float = 1.0
    """Of the advantages; with 1 and 1 they are reward minus value."""
    show: int = 40
    """Responses on the page: those with most repeated tokens, and as many others drawn at random."""
    max_tokens: int = 4000
    """Of a longer response the page holds the beginning."""
    num_resamples: int = 2000
    """Of the bootstrap."""
    max_batch_tokens: int = 16384
    """Tokens the critic reads at once, padding included."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_repeat_tokens", "show", "max_tokens", "num_resamples", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is not at least 1")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is outside [0, 1]")


def main() -> None:
    with plain_errors():
        arguments, console = read_command(Arguments), terminal.console()
        files = [file for path in arguments.generations for file in find_generations(path)]
        with console.status("reading the generations and loading the critic"):
            generations = [generation for file in files for generation in read_generations(file)]
            critic, tokenizer = load_critic(arguments.critic, device=arguments.device)
        with terminal.progress(console) as bar:
            task = bar.add_task("values", total=len(generations))
            responses = value_responses(
                critic,
                generations,
                gamma=arguments.gamma,
                gae_lambda=arguments.gae_lambda,
                min_repeat_tokens=arguments.min_repeat_tokens,
                max_batch_tokens=arguments.max_batch_tokens,
                on_response=lambda: bar.advance(task),
            )
        with console.status("comparing repeated stretches with the rest"):
            compared = contrasts(responses, num_resamples=arguments.num_resamples, seed=arguments.seed)
            page = render_page(
                choose(responses, arguments.show, seed=arguments.seed),
                compared,
                decode=partial(tokenizer.decode, clean_up_tokenization_spaces=False),
                facts=facts(arguments, responses),
                max_tokens=arguments.max_tokens,
            )
        with whole_file(arguments.output) as file:
            file.write(page.encode(errors="replace"))
        console.print(table(compared))
        console.print(f"the page is {arguments.output}")


def choose(responses: Sequence[ValuedResponse], number: int, *, seed: int) -> list[ValuedResponse]:
    """Half of the number those with most repeated tokens, and as many others drawn at random."""
    by_repeated = sorted(responses, key=lambda response: -int(response.is_repeated.sum()))
    most, others = by_repeated[: -(-number // 2)], by_repeated[-(-number // 2) :]
    return most + random.Random(seed).sample(others, min(number // 2, len(others)))


def facts(arguments: Arguments, responses: Sequence[ValuedResponse]) -> dict[str, str]:
    """What was analysed, and how."""
    reward = fmean(response.generation.reward for response in responses)
    return {
        "critic": str(arguments.critic),
        "generations": ", ".join(map(str, arguments.generations)),
        "responses": f"{len(responses):,} with a mean reward of {reward:.3f}",
        "repeated": f"stretches of at least {arguments.min_repeat_tokens} tokens that began earlier in the response",
        "advantages": f"GAE, gamma {arguments.gamma:g}, lambda {arguments.gae_lambda:g}, not whitened",
    }


def table(compared: Sequence[Contrast]) -> Table:
    """The comparison, for the terminal."""
    columns = ("repeated", "elsewhere", f"difference [{CONFIDENCE:.0%}]", "matched", "tokens", "elsewhere")
    rows = terminal.table("repeated stretches against elsewhere", [""], columns)
    for contrast in compared:
        rows.add_row(*map(Text, contrast_cells(contrast)))
    return rows


if __name__ == "__main__":
    main()
