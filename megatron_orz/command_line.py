"""How a command begins and ends: its values are read, and what is wrong is said in one sentence without a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro

USER_ERROR = 2
INTERRUPTED = 130
"""Exit codes."""

Values = TypeVar("Values")


def parse(defaults: Values) -> Values:
    """A dataclass with the command line's changes. Of all ranks, which read the same one, rank 0 alone speaks."""
    with contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(type(defaults), default=defaults, console_outputs=rank() == 0)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the process with a sentence on stderr for what a user can mend; ORZ_DEBUG=1 shows the traceback instead.

    What is wrong with the input (ValueError) is wrong on every rank, and rank 0 alone says it; what breaks later may
    break on one.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(USER_ERROR)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("ORZ_DEBUG"):
            raise
        if rank() == 0 or not isinstance(error, ValueError):
            where = f" on rank {rank()}" if world_size() > 1 else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def rank() -> int:
    """This process among those that torchrun starts, before any process group exists."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun starts."""
    return int(os.environ.get("WORLD_SIZE", 1))
