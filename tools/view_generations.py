"""Shows the generations that a run saved, in the terminal.

python tools/view_generations.py runs/demo                                   # a line per step
python tools/view_generations.py runs/demo --step 12 --show 3                # the first three of step 12
python tools/view_generations.py runs/demo --reward 0 --finish length        # truncated responses without a reward
python tools/view_generations.py runs/demo --prompt 17 --show 8              # one prompt over the steps
python tools/view_generations.py runs/demo --contains "wait," --sort repetition
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Literal

import tyro
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, read_command
from megatron_orz.generations import Generation, find_generations, read_generations
from megatron_orz.printable import printable
from megatron_orz.types import FinishReason


@dataclass(frozen=True)
class Arguments:
    """Shows the generations that a run saved: those that pass every filter, or without a filter a line per step."""

    path: tyro.conf.Positional[Path]
    """Directory of a run, or one file of its generations/."""
    step: tuple[int, ...] = ()
    """Of these steps."""
    prompt: tuple[int, ...] = ()
    """To these prompts, by prompt_id."""
    reward: float | None = None
    """With this reward."""
    finish: FinishReason | None = None
    """Ended by this."""
    contains: str | None = None
    """Whose response holds this text, in any case."""
    sort: Literal["file", "length", "repetition", "reward"] = "file"
    """In the order of the file, or the largest first."""
    show: int = 3
    """At most so many."""
    max_characters: int = 4000
    """A longer prompt or response is cut in its middle; 0 cuts none."""

    def __post_init__(self) -> None:
        if self.show < 1:
            raise ValueError(f"--show {self.show} shows nothing; give at least 1")
        if self.max_characters < 0:
            raise ValueError(f"--max-characters {self.max_characters} is negative; 0 cuts none")

    @property
    def is_filtered(self) -> bool:
        """Whether any generation in particular is asked for."""
        return self.sort != "file" or any(
            value not in (None, ()) for value in (self.step, self.prompt, self.reward, self.finish, self.contains)
        )

    def asks_for(self, generation: Generation) -> bool:
        """Whether it passes every filter."""
        return (
            (not self.step or generation.step in self.step)
            and (not self.prompt or generation.prompt_id in self.prompt)
            and (self.reward is None or abs(generation.reward - self.reward) < 1e-6)
            and (self.finish is None or generation.finish_reason == self.finish)
            and (self.contains is None or self.contains.lower() in generation.response.lower())
        )


def main() -> None:
    with plain_errors():
        arguments, console = read_command(Arguments), terminal.console()
        files = find_generations(arguments.path)
        if not arguments.is_filtered and arguments.path.is_dir():
            console.print(steps_table(files, console))
            return
        num_passing = 0

        def passing() -> Iterator[Generation]:
            nonlocal num_passing
            for generation in chain.from_iterable(map(read_generations, files)):
                if arguments.asks_for(generation):
                    num_passing += 1
                    yield generation

        with console.status("reading generations"):
            shown = first(passing(), arguments)
        if not shown:
            raise ValueError(f"none of the generations of {arguments.path} passes the filters; give fewer of them")
        for generation in shown:
            console.print(card(generation, max_characters=arguments.max_characters))
        console.print(f"{len(shown)} of {num_passing} generations; --show shows more", style="dim")


def first(generations: Iterable[Generation], arguments: Arguments) -> list[Generation]:
    """The first `show` in the order that is asked for; all are counted by whoever yields them."""
    if arguments.sort == "file":
        generations = iter(generations)
        shown = list(islice(generations, arguments.show))
        for _ in generations:
            pass
        return shown
    attribute = "num_response_tokens" if arguments.sort == "length" else arguments.sort
    return heapq.nlargest(arguments.show, generations, key=lambda generation: getattr(generation, attribute))


def steps_table(files: Sequence[Path], console: Console) -> Table:
    """What each step's file holds."""
    columns = ("step", "rollouts", "prompts", "versions", "reward", "length", "cut", "reflecting", "repetition")
    table = terminal.table(None, [], columns)
    with console.status("reading generations") as status:
        for file in files:
            status.update(f"reading {file.name}")
            rows = list(read_generations(file))
            if not rows:
                table.add_row(file.stem, "0")
                continue
            table.add_row(
                str(rows[0].step),
                f"{len(rows):,}",
                f"{len({row.prompt_id for row in rows}):,}",
                versions_of(rows),
                f"{fmean(row.reward for row in rows):.3f}",
                f"{fmean(row.num_response_tokens for row in rows):,.0f}",
                f"{100 * fmean(row.finish_reason != 'stop' for row in rows):.0f} %",
                f"{100 * fmean(bool(row.reflection) for row in rows):.0f} %",
                f"{fmean(row.repetition for row in rows):.3f}",
            )
    return table


def versions_of(rows: Sequence[Generation]) -> str:
    """The versions whose weights sampled any of the tokens, from the oldest to the newest."""
    versions = {row.policy_version for row in rows} | {swap.version for row in rows for swap in row.swaps}
    return ", ".join(map(str, sorted(versions)))


def card(generation: Generation, *, max_characters: int) -> Panel:
    """One generation with its prompt and its verdict."""
    verdict = "right" if generation.is_correct else "timed out" if generation.timed_out else "wrong"
    facts = {
        "reward": f"{generation.reward:g}",
        "answer": f"{generation.extracted} ({verdict}; reference {generation.answer})",
        "finish": generation.finish_reason,
        "tokens": f"{generation.num_prompt_tokens:,} + {generation.num_response_tokens:,}",
        "version": ", ".join(
            [str(generation.policy_version), *(f"{version} from token {token}" for token, version in generation.swaps)]
        ),
        "repetition": f"{generation.repetition:.3f}",
        "reflection": " ".join(generation.reflection) or "-",
    }
    line = Text("  ").join(
        Text(f"{name} ", style="dim").append(printable(value), "bold") for name, value in facts.items()
    )
    return Panel(
        Group(
            Text(printable(shortened(generation.prompt, max_characters)), style="dim"),
            Text(printable(shortened(generation.response, max_characters))),
            Text(),
            line,
        ),
        title=Text(printable(f"step {generation.step} · prompt {generation.prompt_id} · {generation.source}")),
        title_align="left",
        border_style="green" if generation.reward > 0 else "red",
        box=box.ROUNDED,
    )


def shortened(text: str, max_characters: int) -> str:
    """The text without its middle where it is longer than that."""
    if not max_characters or len(text) <= max_characters:
        return text
    half = max_characters // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


if __name__ == "__main__":
    main()
