"""How a command begins and ends: its values are read, and what is wrong is said in one sentence without a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tyro

USER_ERROR = 2
RANK_LOST = 123
HUNG = 124
INTERRUPTED = 130
"""Exit codes; docs/hangs.md tells what they mean."""

EXPECTED_ERRORS = (ValueError, RuntimeError, OSError)
"""What is said in a sentence; anything else is a defect, and shows its traceback."""

CHOICES_OF_DEFAULTS = (tyro.conf.AvoidSubcommands,)

Values = TypeVar("Values")


def parse(defaults: Values, arguments: Sequence[str] | None = None) -> Values:
    """A dataclass with the command line's changes. Of all ranks, which read the same one, rank 0 alone speaks.

    arguments: the command line; by default that of this process.
    Of a field that may be one of several dataclasses, or None, the defaults say which it is.
    """
    with contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            type(defaults),
            args=arguments,
            default=defaults,
            description=_description(),
            console_outputs=rank() == 0,
            config=CHOICES_OF_DEFAULTS,
        )


def read_command(commands: Any, arguments: Sequence[str] | None = None) -> Any:
    """The command line of a tool as the dataclass given, or as one of several: a mapping or a union of subcommands.

    arguments: the command line; by default that of this process.
    """
    if isinstance(commands, Mapping):
        return tyro.extras.subcommand_cli_from_dict(dict(commands), args=arguments, description=_description())
    return tyro.cli(commands, args=arguments, description=_description())


def run_command(commands: Mapping[str, tuple[type, Callable[[Any], Any]]]) -> Any:
    """Runs the subcommand that a command line names, by name the dataclass of its values and what is done with them."""
    values = read_command({name: kind for name, (kind, _) in commands.items()})
    (run,) = (run for kind, run in commands.values() if type(values) is kind)
    return run(values)


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and after it: a tool's own words, and those of the recipe that it starts."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


def _description() -> str | None:
    """How help begins: with the docstring of the program, which holds examples, each on a line of its own."""
    docstring = sys.modules["__main__"].__doc__
    return docstring and re.sub(r"\n+ *(?=(python|torchrun|sh) )", "\n\n", docstring)


class RunEnded(RuntimeError):
    """The run ends on this rank because it has failed on another."""

    def __init__(self, message: str, *, exit_code: int, is_said: bool) -> None:
        """is_said: the other rank says it."""
        super().__init__(message)
        self.exit_code = exit_code
        self.is_said = is_said


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
    except RunEnded as end:
        if not end.is_said:
            print(f"error: {end}", file=sys.stderr, flush=True)
        sys.exit(end.exit_code)
    except EXPECTED_ERRORS as error:
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


def num_nodes() -> int:
    """On how many nodes torchrun starts them, as many on each."""
    return world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
