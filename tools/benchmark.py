"""Benchmarks.

python tools/benchmark.py kernels
python tools/benchmark.py kernels --only token-loss gae --shape 512,64,4096
python tools/benchmark.py sync
python tools/benchmark.py sync --model 0.5b --dtype bfloat16 --transport ipc gloo --num-servers 2
"""

import sys

import tyro

from megatron_orz.benchmark import kernels, sync


def main() -> None:
    try:
        arguments: kernels.Arguments | sync.Arguments = tyro.extras.subcommand_cli_from_dict(
            {"kernels": kernels.Arguments, "sync": sync.Arguments}, description=__doc__
        )
        if isinstance(arguments, kernels.Arguments):
            kernels.run(arguments)
        else:
            sync.run(arguments)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
