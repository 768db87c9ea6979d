"""Benchmarks the ops of `megatron_orz.ops`: each beside what else computes the same, in one run on one machine."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress

from megatron_orz import terminal
from megatron_orz.benchmark import environment, gae, head, report, results, value
from megatron_orz.benchmark.group import OURS, Finding, Findings, Group, Row
from megatron_orz.benchmark.measure import Run, interleaved_times, peak_extra_bytes
from megatron_orz.benchmark.options import check_positive
from megatron_orz.benchmark.own_process import call_in_process

Task = Literal["log-prob", "log-prob-gradient", "token-loss", "value-loss", "gae"]

DEFAULT_SHAPES = {"cpu": ("smollm2",), "cuda": ("7b", "32b", "0.5b")}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_REPEATS = {"cpu": 5, "cuda": 20}
MIN_TIMING_S = 0.5
"""Without a number of repeats, the implementations of a task run at least so long in all."""
MEMORY_TIMEOUT_S = 1800.0
"""Of the two runs that the memory of a row takes."""


@dataclass(frozen=True)
class Arguments:
    """Times the kernels of megatron_orz beside other implementations of the same, and measures their memory.

    Every implementation is first compared with float64; one that computes something else is not timed. Runs take turns,
    and the matrix products that nothing can avoid are timed among them: their sum is the floor.
    """

    only: tuple[Task, ...] = get_args(Task)
    """Tasks to run."""
    shape: tuple[str, ...] = ()
    """Of the language-model head: names (smollm2, 0.5b, 7b, 32b) or tokens,hidden,vocabulary; by default smollm2 on a
    CPU and the others on CUDA."""
    num_sequences: int = 8192
    """Of the gae task."""
    without: tuple[str, ...] = ()
    """Implementations to leave out, as the table names them."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of hidden states and weights; by default float32 on a CPU and bfloat16 on CUDA."""
    repeats: int | None = None
    """Timed runs of each implementation; by default 5 on a CPU and 20 on CUDA, and more where they are short."""
    memory: bool = True
    """Also measure memory; on a CPU this starts a process for each implementation."""
    output: Path | None = None
    """Where the figures go; by default bench/results/<device>-kernels.json."""

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but there is none; use --device cpu")
        check_positive(self, "repeats", "num_sequences")
        for name in self.shape:
            parse_shape(name)
        if OURS in self.without:
            raise ValueError(f"without has {OURS}, beside which everything else is measured; leave it out")


@dataclass(frozen=True)
class Spec:
    """What a group is built from, in any process."""

    task: Task
    shape: str
    num_sequences: int
    device: str
    dtype: str

    def build(self) -> Group:
        device, dtype = torch.device(self.device), getattr(torch, self.dtype)
        if self.task == "gae":
            return gae.group(self.num_sequences, device)
        if self.task == "value-loss":
            return value.group(self.shape, parse_shape(self.shape), device, dtype)
        return head.group(self.task, self.shape, parse_shape(self.shape), device, dtype)


def parse_shape(name: str) -> head.HeadShape:
    """`7b` or `tokens,hidden,vocabulary`. Raises ValueError for anything else."""
    if name in head.SHAPES:
        return head.SHAPES[name]
    parts = name.split(",")
    if len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts):
        return head.HeadShape(*map(int, parts))
    raise ValueError(f'shape "{name}" is neither of {", ".join(head.SHAPES)} nor tokens,hidden,vocabulary')


def specs(arguments: Arguments) -> Iterator[Spec]:
    shapes = arguments.shape or DEFAULT_SHAPES[arguments.device]
    dtype = arguments.dtype or DEFAULT_DTYPE[arguments.device]
    for task in arguments.only:
        for shape in shapes if task != "gae" else shapes[:1]:
            yield Spec(task, shape, arguments.num_sequences, arguments.device, dtype)


def run(arguments: Arguments, console: Console | None = None) -> Path:
    """Prints a table for each task and shape; returns the path of the results file."""
    console = console or Console()
    device = torch.device(arguments.device)
    content: dict[str, Any] = {"environment": environment.describe(device), "groups": []}
    with terminal.progress() as progress:
        for spec in specs(arguments):
            group = spec.build()
            findings = measure(group, spec, arguments, progress)
            console.print(report.table(group, findings))
            content["groups"].append(report.as_json(group, findings))
            del group
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results.write(arguments.output, "kernels", content, device, console)


def measure(group: Group, spec: Spec, arguments: Arguments, progress: Progress) -> Findings:
    """Checks every row, measures its memory, then times all of them together with the floor."""
    device = torch.device(spec.device)
    repeats = arguments.repeats or DEFAULT_REPEATS[spec.device]
    where = progress.add_task(f"{group.task}, {group.shape}")
    rows = {name: row for name, row in group.rows.items() if name not in arguments.without}
    findings = {name: Finding(note=why) for name, why in group.missing.items() if name not in arguments.without}
    good: dict[str, Row] = {}
    for name, row in rows.items():
        progress.update(where, description=f"{group.task}: checking {name}")
        findings[name], is_good = check(name, row, group)
        if is_good:
            good[name] = row

    floor = group.floor()  # before the first run of a row: one that does not fit beside it cannot be timed with it
    memory: dict[str, int] = {}
    for name in list(good):
        progress.update(where, description=f"{group.task}: memory of {name}")
        try:
            if arguments.memory:
                memory[name] = extra_bytes(spec, name, good[name], device)
            else:
                good[name].run()
        except torch.OutOfMemoryError:
            findings[name] = replace(findings[name], note="out of memory")
            del good[name]

    runs: dict[str, Run] = {name: row.run for name, row in good.items()} | dict(floor)
    num_done = 0

    def on_run() -> None:
        nonlocal num_done
        num_done += 1
        progress.update(where, description=f"{group.task}: timing, run {num_done}")

    min_s = MIN_TIMING_S if arguments.repeats is None else 0.0
    times = interleaved_times(runs, device, num_repeats=repeats, min_s=min_s, on_run=on_run)
    progress.remove_task(where)
    for name, row in good.items():
        findings[name] = Finding(times[name], memory.get(name), findings[name].errors, row.note)
    floor_s = sum(count * min(times[name]) for name, count in group.floor_counts.items()) if floor else None
    return Findings({name: findings[name] for name in [*rows, *group.missing] if name in findings}, floor_s)


def check(name: str, row: Row, group: Group) -> tuple[Finding, bool]:
    """What a row is off by, and whether it computes what it should. Exits if one of ours does not."""
    is_ours = name.startswith(OURS)
    try:
        errors = row.errors()
    except Exception as error:  # another project's code: a row of the table must not end the others
        if is_ours:
            raise
        return Finding(note=f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"), False
    limits = group.our_limits if is_ours else group.limits
    beyond = [f"{what} is off by {error:.1e}" for what, error in errors.items() if not error <= limits[what]]
    if beyond and is_ours:
        sys.exit(f"{name}, {group.task}, {group.shape}: {' and '.join(beyond)}; nothing was timed")
    return Finding(errors=errors, note=f"wrong: {' and '.join(beyond)}" if beyond else row.note), not beyond


def extra_bytes(spec: Spec, name: str, row: Row, device: torch.device) -> int:
    """Of one row; on a CPU in a process of its own, whose memory nothing else has touched."""
    if device.type == "cuda":
        return peak_extra_bytes(row.run, device, forget=row.forget)
    return call_in_process(extra_bytes_here, spec, name, torch.get_num_threads(), timeout_s=MEMORY_TIMEOUT_S)


def extra_bytes_here(spec: Spec, name: str, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    row = spec.build().rows[name]
    return peak_extra_bytes(row.run, torch.device(spec.device), forget=row.forget)
