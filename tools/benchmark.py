"""Benchmarks.

python tools/benchmark.py train
python tools/benchmark.py train --only policy --num-sequences 16 --max-response-tokens 256
python tools/benchmark.py kernels
python tools/benchmark.py kernels --only token-loss gae --shape 512,64,4096
python tools/benchmark.py sync
python tools/benchmark.py sync --model 0.5b --dtype bfloat16 --transport ipc gloo --num-servers 2
"""

import sys
from typing import Any

import tyro
from rich.console import Console

from megatron_orz.benchmark import kernels, sync, train

SUBJECTS: dict[str, Any] = {"train": train, "kernels": kernels, "sync": sync}
WIDTH = 140
"""Columns of what goes into a file."""


def main() -> None:
    commands = {name: module.Arguments for name, module in SUBJECTS.items()}
    try:
        arguments: Any = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        (module,) = (module for module in SUBJECTS.values() if isinstance(arguments, module.Arguments))
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        module.run(arguments, console)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
