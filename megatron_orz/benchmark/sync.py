"""Benchmarks the weight exchange: seconds and bytes per second of every transport, beside plain copies, the disk and
sockets."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_orz import terminal
from megatron_orz.benchmark import environment, floors, results, workload
from megatron_orz.benchmark.bare_pipeline import BarePipeline
from megatron_orz.benchmark.bare_server import BareServer
from megatron_orz.benchmark.measure import Run, interleaved_times
from megatron_orz.benchmark.options import check_positive
from megatron_orz.benchmark.workload import ModelName
from megatron_orz.config import TransportKind

MEMCPY, DISK, LOOPBACK = "memcpy", "disk write and read", "loopback TCP"
NETWORK_TRANSPORTS: tuple[TransportKind, ...] = ("gloo", "disk")
LR = 1e-6
"""By which every weight differs between two updates of changes alone, up or down: as after one step of Adam."""
SCALE = 0.02
"""Standard deviation of the weights, on which it depends how many a step changes."""
TIMEOUT_S = 600.0
SHARE_OF_MEMCPY = 0.6
"""Target of the fastest transport on a CPU."""


@dataclass(frozen=True)
class Arguments:
    """Times whole weight updates into servers that receive and drop the weights: what remains of an update when the
    servers load at once. The trainer's half and the workers' half are those of a run."""

    model: tuple[ModelName, ...] = ("smollm2",)
    """Whose weights are sent; random ones of the same shapes."""
    transport: tuple[TransportKind, ...] = ()
    """By default all that this machine has."""
    num_servers: int = 1
    """Servers that one send reaches."""
    num_stages: int = 1
    """Time gloo and disk also with so many pipeline stages, each of which sends its part of the weights."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the weights are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the trainer."""
    wire_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights on the way, which is the servers'; that of the trainer by default."""
    delta: bool = False
    """Time gloo and disk also with fleet.delta, in which each update changes the weights by 1e-6 up or down."""
    repeats: int = 5
    """Timed updates of each transport."""
    folder: Path | None = None
    """Of the disk transport; a temporary one by default."""
    output: Path | None = None
    """Where the figures go; by default bench/results/<device>-sync.json."""

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but there is none; use --device cpu")
        check_positive(self, "repeats", "num_servers", "num_stages")
        if self.num_stages > 1 and self.device == "cuda":
            raise ValueError(
                f"num_stages is {self.num_stages}, and the stages here are threads of one process, which would share "
                "its GPU; set --device cpu"
            )
        if "auto" in self.transport:
            raise ValueError("transport has auto, which is one of the others; name those to time")
        if self.delta and (self.dtype, self.wire_dtype) != ("float32", "bfloat16"):
            raise ValueError(
                f"delta is about small changes of float32 weights that few bfloat16 ones show, and they are of "
                f"{self.dtype} and {self.wire_dtype or self.dtype}; set --dtype float32 --wire-dtype bfloat16"
            )
        if "nccl" in self.transport and not torch.cuda.is_available():
            raise ValueError("transport has nccl, but there is no GPU; leave it out")

    @property
    def transports(self) -> tuple[TransportKind, ...]:
        """What to time: all that this machine has."""
        # Each process of a group needs a GPU of its own.
        with_gpu: tuple[TransportKind, ...] = ("nccl",) if torch.cuda.device_count() > self.num_servers else ()
        return self.transport or ("ipc", *with_gpu, "gloo", "disk")


def make_weights(model: ModelName, dtype: torch.dtype, device: torch.device) -> list[tuple[str, Tensor]]:
    """Random weights under Hugging Face names; tied ones once."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(workload.model_config(model)).named_parameters()
    return [(name, SCALE * torch.randn(weight.shape, dtype=dtype, device=device)) for name, weight in parameters]


def run(arguments: Arguments, console: Console | None = None) -> Path:
    """Prints a table for each model; returns the path of the results file."""
    console = console or Console()
    device = torch.device(arguments.device)
    content: dict[str, Any] = {
        "environment": environment.describe(device),
        "arguments": asdict(arguments),
        "load_average": os.getloadavg(),
        "models": [],
    }
    with terminal.progress() as progress:
        for model in arguments.model:
            task = progress.add_task(f"{model}: starting the servers, then timing", total=None)
            weights = make_weights(model, getattr(torch, arguments.dtype), device)
            times, sent_bytes = measure(weights, arguments)
            progress.remove_task(task)
            num_bytes = sum(weight.nbytes for _, weight in weights)
            console.print(table(model, times, sent_bytes, num_bytes, arguments))
            content["models"].append(
                {"model": model, "num_bytes": num_bytes, "times_s": times, "sent_bytes": sent_bytes}
            )
    content["load_average_after"] = os.getloadavg()
    return results.write(arguments.output, "sync", content, device, console)


def measure(
    weights: Sequence[tuple[str, Tensor]], arguments: Arguments
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the updates over each transport, and of what they are compared with, which all take turns; and the
    bytes that each transport has moved in its last update."""
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dtype = arguments.wire_dtype or arguments.dtype
        on_the_way = [(name, weight.to(getattr(torch, dtype))) for name, weight in weights]
        runs: dict[str, Run] = {MEMCPY: floors.memcpy(weights)}
        if "disk" in arguments.transports:
            runs[DISK] = floors.disk(on_the_way, folder / "raw")
        if "gloo" in arguments.transports:
            runs[LOOPBACK] = stack.enter_context(floors.loopback(on_the_way))
        started = {
            (kind, delta, num_stages): [
                stack.enter_context(BareServer(device=device, dtype=dtype)) for device in _devices(arguments)
            ]
            for kind in arguments.transports
            for delta in ([False, True] if arguments.delta and kind in NETWORK_TRANSPORTS else [False])
            for num_stages in ({1, arguments.num_stages} if kind in NETWORK_TRANSPORTS else {1})
        }
        versions = [weights, _trained(weights)] if arguments.delta else [weights]
        senders: dict[str, BarePipeline] = {}
        for (kind, delta, num_stages), servers in started.items():
            name = kind + ", delta" * delta + f", {num_stages} stages" * (num_stages > 1)
            sender = BarePipeline(
                servers,
                kind,
                folder / name,
                num_stages=num_stages,
                timeout_s=TIMEOUT_S,
                verification="off",
                delta=delta,
            )
            stack.enter_context(closing(sender))
            sender.connect()
            senders[name] = sender
            runs[name] = partial(_send, sender, cycle([_split(version, num_stages) for version in versions]))
        # Wall-clock time also on a GPU: an update is over when the servers say so.
        times = interleaved_times(runs, torch.device("cpu"), num_repeats=arguments.repeats)
        return times, {name: sender.metrics()["sync/gib"] * 2**30 for name, sender in senders.items()}


def table(
    model: str,
    times: Mapping[str, Sequence[float]],
    sent_bytes: Mapping[str, float],
    num_bytes: int,
    arguments: Arguments,
) -> Table:
    """A line for each transport; the target below."""
    shares = {name: min(times[MEMCPY]) / min(seconds) for name, seconds in times.items()}
    best = max(shares[kind] for kind in arguments.transports)
    caption = f"target, at least {SHARE_OF_MEMCPY:.0%} of {MEMCPY} on a CPU: {best:.0%}"
    title = f"{model}, {num_bytes / 1e9:.2f} GB, {arguments.num_servers} server(s)"
    columns = ("min s", "median s", "GB/s", f"of {MEMCPY}", "MB moved")
    result = terminal.table(title, [""], columns, caption=caption if arguments.device == "cpu" else None)
    for name, seconds in times.items():
        speed = num_bytes / min(seconds) / 1e9
        cells = [f"{min(seconds):.3f}", f"{statistics.median(seconds):.3f}", f"{speed:.2f}", f"{shares[name]:.0%}"]
        cells.append(f"{sent_bytes[name] / 1e6:.1f}" if name in sent_bytes else "")
        result.add_row(name, *cells)
    return result


def _devices(arguments: Arguments) -> list[str]:
    """Of the servers: the GPUs after the trainer's, or its own where it is the only one."""
    if arguments.device == "cpu":
        return ["cpu"] * arguments.num_servers
    others = range(1, torch.cuda.device_count()) or range(1)
    return [f"cuda:{others[index % len(others)]}" for index in range(arguments.num_servers)]


def _trained(weights: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, weight + LR * torch.randn_like(weight).sign()) for name, weight in weights]


def _split(weights: Sequence[tuple[str, Tensor]], num_stages: int) -> list[Sequence[tuple[str, Tensor]]]:
    """Parts of about the same size, in order."""
    ends = accumulate(weight.nbytes for _, weight in weights)
    share = sum(weight.nbytes for _, weight in weights) / num_stages
    stages = [min(num_stages - 1, int((end - 1) // share)) for end in ends]
    return [[item for item, of in zip(weights, stages, strict=True) if of == stage] for stage in range(num_stages)]


def _send(sender: BarePipeline, versions: Iterator[Sequence[Sequence[tuple[str, Tensor]]]]) -> None:
    sender.send([iter(part) for part in next(versions)], 0)
