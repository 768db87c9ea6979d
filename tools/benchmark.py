"""Benchmarks, each beside what else does the same; docs/benchmark.md tells what they show.

python tools/benchmark.py train
python tools/benchmark.py train --only policy --num-sequences 16 --max-response-tokens 256
python tools/benchmark.py end-to-end
python tools/benchmark.py end-to-end --only equal --contenders ours trl
python tools/benchmark.py packing
python tools/benchmark.py rewards
python tools/benchmark.py kernels
python tools/benchmark.py kernels --only token-loss gae --shape 512,64,4096
python tools/benchmark.py sync
python tools/benchmark.py sync --model 0.5b --dtype bfloat16 --transport ipc gloo --num-servers 2
python tools/benchmark.py sync --dtype float32 --wire-dtype bfloat16 --delta
python tools/benchmark.py delta runs/demo-base/final runs/demo/exports/*
python tools/benchmark.py compare before.json after.json
python tools/benchmark.py table
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_orz.benchmark import compare, delta, end_to_end, kernels, packing, rewards, summary, sync, train
from megatron_orz.command_line import plain_errors, run_command
from megatron_orz.terminal import console

COMMANDS: dict[str, tuple[Any, Callable[..., object]]] = {
    "train": (train.Arguments, train.run),
    "end-to-end": (end_to_end.Arguments, end_to_end.run),
    "packing": (packing.Arguments, packing.run),
    "rewards": (rewards.Arguments, rewards.run),
    "kernels": (kernels.Arguments, kernels.run),
    "sync": (sync.Arguments, sync.run),
    "delta": (delta.Arguments, delta.run),
    "compare": (compare.Arguments, compare.main),
    "table": (summary.Arguments, summary.run),
}


def main() -> None:
    with plain_errors():
        shown = console()
        run_command({name: (kind, partial(run, console=shown)) for name, (kind, run) in COMMANDS.items()})


if __name__ == "__main__":
    main()
