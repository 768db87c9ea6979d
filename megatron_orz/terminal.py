"""What tools show in a terminal: one form of tables and of progress bars."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

WIDTH = 150
"""Columns of what goes into a file or a pipe."""


def console() -> Console:
    """Where a tool prints its findings: stdout, as wide as the terminal where there is one."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def table(
    title: str | None,
    left: Sequence[str],
    right: Sequence[str] = (),
    *,
    notes: bool = False,
    caption: str | None = None,
) -> Table:
    """An empty table: columns of text, then of numbers, then one without a heading for notes.

    The first column names the rows, and is never broken into lines.
    """
    result = Table(
        title=title and escape(title), caption=caption and escape(caption), caption_justify="left", box=box.SIMPLE_HEAD
    )
    for index, heading in enumerate(left):
        result.add_column(Text(heading), no_wrap=index == 0)
    for heading in right:
        result.add_column(Text(heading), justify="right")
    if notes:
        result.add_column("")
    return result


def progress(on: Console | None = None, *, in_bytes: bool = False) -> Progress:
    """Bars on terminals, which vanish at the end: what is done, how much of it, for how long already and still.

    on: the console that is printed to meanwhile; by default stderr, which keeps them out of files and pipes.
    """
    on = on or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=on,
        transient=True,
        disable=not on.is_terminal,
    )
