"""Benchmarks.

python tools/benchmark.py kernels
python tools/benchmark.py kernels --only token-loss gae --shape 512,64,4096
"""

import sys

import tyro

from megatron_orz.benchmark import kernels


def main() -> None:
    try:
        arguments = tyro.extras.subcommand_cli_from_dict({"kernels": kernels.Arguments}, description=__doc__)
        kernels.run(arguments)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
