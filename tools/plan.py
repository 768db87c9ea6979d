"""Plans a run: what each GPU would hold, and how long a step would take.

python tools/plan.py layout path/to/Qwen2.5-7B --gpus 8
python tools/plan.py layout path/to/Qwen2.5-32B --gpus 16 --gpu-gib 80 --max-pack-tokens 32768
python tools/plan.py simulate orz-7b-h800 --gpus 64
python tools/plan.py simulate runs/demo --gpus 2 8 64 --output runs/demo-plan
python tools/plan.py simulate runs/demo --against runs/other
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, run_command
from megatron_orz.config import DType, ParallelConfig, Recompute
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.memory import BYTES, ModelMemory, fullest_stage, kv_cache_bytes, num_parameters
from megatron_orz.simulation import command as simulation

GIB = 2**30
USABLE_SHARE = 0.9
"""The rest is left to the CUDA context, communication buffers and the allocator's gaps."""
LEVELS: tuple[Recompute, ...] = ("none", "full")

# What a layout costs of a step's time, as rules of thumb: they order layouts, and predict no times.
RECOMPUTE_COST: dict[Recompute, float] = {"none": 1.0, "selective": 1.0, "full": 1.33}
COST_OF_DOUBLING = {"tp": 0.08, "cp": 0.05, "ep": 0.05}


@dataclass(frozen=True)
class Arguments:
    """Suggests a layout for training a policy and a critic of one model on a number of GPUs."""

    model: tyro.conf.Positional[Path]
    """Directory with the model's config.json."""
    gpus: int
    """GPUs of the trainer."""
    gpu_gib: float = 80.0
    """Memory of one GPU."""
    gpus_per_node: int = 8
    """Tensor parallelism stays within a node."""
    max_pack_tokens: int = 16384
    """T of the longest pack (data.max_pack_tokens)."""
    packs_per_rank: int = 16
    """Packs of a mini-batch that each data-parallel rank runs: more of them fill a pipeline better."""
    dtype: DType = "bfloat16"
    fleet: Literal["colocated", "separate"] = "colocated"
    """Colocated servers take turns with the trainer, which offloads its memory meanwhile."""
    server_tp: int = 1
    """Tensor-parallel size of a colocated server."""
    kv_tokens: int = 262144
    """Tokens whose keys and values a colocated server shall hold at once."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "max_pack_tokens", "packs_per_rank", "server_tp", "kv_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")
        if not self.gpu_gib > 0:
            raise ValueError(f"gpu_gib {self.gpu_gib:g} is not positive")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and the bytes it takes on its fullest GPU."""

    parallel: ParallelConfig
    dp: int
    recompute: Recompute
    policy: ModelMemory
    critic: ModelMemory
    cost: float
    """Relative time of a step."""

    @property
    def training(self) -> int:
        """Both models are resident; one of them trains at a time."""
        return self.policy.resident + self.critic.resident + max(self.policy.activations, self.critic.activations)

    def describe(self) -> str:
        p = self.parallel
        parts = {"tp": p.tp, "pp": p.pp, "cp": p.cp, "ep": p.ep}
        cut = " ".join(f"{name} {size}" for name, size in parts.items() if size > 1)
        return f"{cut + ' ' if cut else ''}dp {self.dp}, recompute {self.recompute}"


def plans(architecture: Architecture, arguments: Arguments) -> list[Plan]:
    """Every layout the model can be cut into, the cheapest first."""
    found = [
        _plan(architecture, parallel, recompute, arguments)
        for parallel in _grids(architecture, arguments)
        for recompute in LEVELS
    ]
    return sorted(found, key=lambda plan: plan.cost)


def suggest(candidates: list[Plan], arguments: Arguments) -> Plan | None:
    """The cheapest layout that fits, or None."""
    usable = USABLE_SHARE * arguments.gpu_gib * GIB
    return next((plan for plan in candidates if plan.training <= usable), None)


def _grids(architecture: Architecture, arguments: Arguments) -> Iterator[ParallelConfig]:
    powers = [2**exponent for exponent in range(arguments.gpus.bit_length())]
    eps = powers if architecture.experts else [1]
    for tp, pp, cp, ep in itertools.product(powers, powers, powers, eps):
        if tp > arguments.gpus_per_node or arguments.gpus % (tp * pp * cp):
            continue
        parallel = ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=tp > 1, overlap=True)
        try:
            parallel.check_world_size(arguments.gpus)
            architecture.check_layout(parallel)
        except ValueError:
            continue
        yield parallel


def _plan(architecture: Architecture, parallel: ParallelConfig, recompute: Recompute, arguments: Arguments) -> Plan:
    memory = partial(
        fullest_stage,
        architecture,
        parallel,
        world_size=arguments.gpus,
        pack_tokens=arguments.max_pack_tokens,
        dtype=arguments.dtype,
        recompute=recompute,
    )
    idle = (parallel.pp - 1) / arguments.packs_per_rank
    cost = RECOMPUTE_COST[recompute] * (1 + idle)
    for name, doubling in COST_OF_DOUBLING.items():
        cost *= 1 + doubling * math.log2(getattr(parallel, name))
    return Plan(
        parallel=parallel,
        dp=arguments.gpus // (parallel.tp * parallel.pp * parallel.cp),
        recompute=recompute,
        policy=memory(value_head=False),
        critic=memory(value_head=True),
        cost=cost,
    )


def reasons(chosen: Plan, candidates: list[Plan], architecture: Architecture, arguments: Arguments) -> list[str]:
    """Why this layout and not a cheaper one, and what it leaves."""
    usable = USABLE_SHARE * arguments.gpu_gib
    lines = [
        f"{chosen.describe()}: {chosen.training / GIB:.1f} GiB of {arguments.gpu_gib:g} while training "
        f"({usable:.1f} usable)"
    ]
    cheaper = candidates[: candidates.index(chosen)]
    lines += [f"cheaper, but too large: {plan.describe()} needs {plan.training / GIB:.1f} GiB" for plan in cheaper[-3:]]
    if not cheaper:
        lines.append("no layout moves less between GPUs: every rank holds whole models")
    if chosen.parallel.tp > 1:
        lines.append("sequence_parallel cuts what lies between tensor-parallel regions, at no cost")
    if arguments.fleet == "colocated":
        weights = num_parameters(architecture) * BYTES["bfloat16"] // arguments.server_tp
        cache = kv_cache_bytes(architecture, num_tokens=arguments.kv_tokens, server_tp=arguments.server_tp)
        verdict = "fits" if weights + cache <= usable * GIB else "does not fit: raise server_tp or lower kv_tokens"
        lines.append(
            f"while generating, with the trainer offloaded: {weights / GIB:.1f} GiB of weights and "
            f"{cache / GIB:.1f} GiB of keys and values: {verdict}"
        )
    return lines


def print_table(shown: list[Plan], chosen: Plan | None, console: Console) -> None:
    columns = ("weights", "gradients", "optimizer", "activations", "training", "time")
    table = terminal.table("GiB on the fullest GPU, and a step's relative time", ["layout"], columns)
    for plan in shown:
        models = (plan.policy, plan.critic)
        sums = [sum(getattr(m, name) for m in models) for name in ("weights", "gradients", "optimizer")]
        sizes = [*sums, max(m.activations for m in models), plan.training]
        marked = "bold" if plan is chosen else None
        table.add_row(plan.describe(), *(f"{size / GIB:.1f}" for size in sizes), f"{plan.cost:.2f}", style=marked)
    console.print(table)


def suggest_layout(arguments: Arguments) -> None:
    """Prints the layouts around the cheapest that fits, and why it is that one. Raises ValueError where none fits."""
    architecture = read_architecture(arguments.model)
    candidates = plans(architecture, arguments)
    if not candidates:
        raise ValueError(f"the model cannot be laid out on {arguments.gpus} GPUs; choose a number with more divisors")
    chosen = suggest(candidates, arguments)
    console = terminal.console()
    last = candidates.index(chosen) if chosen else len(candidates) - 1
    print_table(candidates[max(0, last - 3) : last + 4], chosen, console)
    if chosen is None:
        smallest = min(candidates, key=lambda plan: plan.training)
        raise ValueError(
            f"no layout fits {arguments.gpu_gib:g} GiB; the smallest, {smallest.describe()}, needs "
            f"{smallest.training / GIB:.1f} GiB: add GPUs or lower max_pack_tokens"
        )
    for line in reasons(chosen, candidates, architecture, arguments):
        console.print(f"- {line}")


def main() -> None:
    with plain_errors():
        simulate = partial(simulation.run, console=terminal.console())
        run_command({"layout": (Arguments, suggest_layout), "simulate": (simulation.Arguments, simulate)})


if __name__ == "__main__":
    main()
