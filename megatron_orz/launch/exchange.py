"""Whether the ranks of a job can compute together: an all-reduce of all of them, and the difference of their clocks.

Run once on every rank, in a process of its own that leaves nothing on the GPU (`agent.py`):

    python -m megatron_orz.launch.exchange --timeout-s 120 --max-skew-s 1
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_orz.command_line import plain_errors, read_command
from megatron_orz.launch.node import node_name
from megatron_orz.ranks import Ranks

NUM_BYTES = 64 * 2**20
"""Of the timed all-reduce, on GPUs; a thousandth of it on CPUs."""
_ROUNDS = 5


@dataclass(frozen=True)
class Arguments:
    """Checks that the ranks of torchrun's environment variables can talk to each other."""

    timeout_s: float = 120.0
    """Deadline of every collective."""
    max_skew_s: float = 1.0
    """Largest difference between the clocks of two nodes."""


def exchange(arguments: Arguments) -> str:
    """All-reduces a known tensor. Returns a line on speed and clocks.

    Raises RuntimeError for a wrong sum, and ValueError for clocks that differ.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda") if has_gpu else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=timedelta(seconds=arguments.timeout_s))
    try:
        num_elements = NUM_BYTES // 4 if has_gpu else NUM_BYTES // 4000
        expected = float(world_size * (world_size + 1) // 2)
        seconds = float("inf")
        for _ in range(_ROUNDS):
            tensor = torch.full((num_elements,), float(rank + 1), device=device)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            if has_gpu:
                torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - started)
            if not torch.all(tensor == expected):
                raise RuntimeError(f"the all-reduce gave rank {rank} on node {node_name()} a wrong sum; leave it out")
        ranks = Ranks()
        ranks.gather(None)  # after which all ranks go on within milliseconds
        clocks = ranks.gather((time.time(), node_name()))
        ranks.close()
    finally:
        dist.destroy_process_group()
    check_clocks(clocks, max_skew_s=arguments.max_skew_s)
    # A ring moves 2 (n - 1) / n of the bytes over each link.
    rate = 2 * (world_size - 1) / world_size * num_elements * 4 / seconds / 1e9
    kind = "NCCL" if has_gpu else "gloo"
    clocks_agree = f"clocks within {_skew(clocks):.3f} s"
    return f"all-reduce of {world_size} ranks by {kind} is right, {rate:.2f} GB/s a rank; {clocks_agree}"


def check_clocks(clocks: list[tuple[float, str]], *, max_skew_s: float) -> None:
    """clocks: seconds and node of every rank, read at one moment. Raises ValueError that names the two ends."""
    if _skew(clocks) > max_skew_s:
        (_, slow), (_, fast) = min(clocks), max(clocks)
        raise ValueError(
            f"the clocks of nodes {slow} and {fast} differ by {_skew(clocks):.1f} s, more than {max_skew_s:g} s; "
            "have them synchronised (chrony, ntpd)"
        )


def _skew(clocks: list[tuple[float, str]]) -> float:
    return max(clocks)[0] - min(clocks)[0]


def main() -> None:
    """Rank 0 prints what was measured."""
    torch.set_num_threads(1)
    with plain_errors():
        line = exchange(read_command(Arguments))
        if os.environ["RANK"] == "0":
            print(line, flush=True)


if __name__ == "__main__":
    main()
