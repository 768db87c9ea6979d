"""Benchmarks what a weight update could leave out: the weights of consecutive checkpoints that differ, in several
encodings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_orz import terminal
from megatron_orz.engine.hf_checkpoint import HFCheckpoint
from megatron_orz.rollout.delta import pack_changes


@dataclass(frozen=True)
class Arguments:
    """Compares each checkpoint with the one before: which share of its weights differs, as they are and in bfloat16,
    and how many bytes an update would need. A run with --checkpoint.export-interval 1 leaves such checkpoints."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Hugging Face checkpoints of a run, oldest first."""

    def __post_init__(self) -> None:
        if len(self.checkpoints) < 2:
            raise ValueError(f"there are {len(self.checkpoints)} checkpoints; name at least two, oldest first")


@dataclass
class Difference:
    """Between two checkpoints; sizes in bytes."""

    num_elements: int = 0
    num_changed: int = 0
    """As the checkpoints have them."""
    num_changed_16: int = 0
    """In bfloat16."""
    num_tensors: int = 0
    num_changed_tensors: int = 0
    """In bfloat16."""
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def whole_bytes(self) -> int:
        """In bfloat16."""
        return 2 * self.num_elements


def _changes(old: Tensor, new: Tensor) -> int:
    changes = pack_changes(old, new)
    return 2 * len(new) if changes is None else len(changes)


def _compressed(old: Tensor, new: Tensor, codec: str) -> int:
    different = (old.view(torch.int16) ^ new.view(torch.int16)).numpy()
    return len(pyarrow.compress(different.data, codec=codec, asbytes=True))


ENCODINGS: Mapping[str, Callable[[Tensor, Tensor], int]] = {
    "changes": _changes,
    "xor, zstd": lambda old, new: _compressed(old, new, "zstd"),
    "xor, lz4": lambda old, new: _compressed(old, new, "lz4"),
}
"""The bytes that each makes of two tensors, [N] bfloat16; the first is that of `fleet.delta`."""


def difference(before: Path, after: Path) -> Difference:
    """Raises ValueError for what is no checkpoint, or one of another model."""
    old_checkpoint, new_checkpoint = HFCheckpoint(before), HFCheckpoint(after)
    found = Difference(sizes=dict.fromkeys(ENCODINGS, 0), seconds=dict.fromkeys(ENCODINGS, 0.0))
    for name in track(new_checkpoint.files, description=after.name, console=Console(stderr=True), transient=True):
        shape, _ = new_checkpoint.shape_and_dtype(name)
        old, new = (checkpoint.read(name, shape).view(-1) for checkpoint in (old_checkpoint, new_checkpoint))
        found.num_changed += int((old != new).count_nonzero())
        old, new = old.bfloat16(), new.bfloat16()
        num_changed_16 = int((old != new).count_nonzero())
        found.num_elements += len(new)
        found.num_changed_16 += num_changed_16
        found.num_tensors += 1
        found.num_changed_tensors += num_changed_16 > 0
        for encoding, size in ENCODINGS.items():
            begin = time.process_time()
            found.sizes[encoding] += size(old, new)
            found.seconds[encoding] += time.process_time() - begin
    return found


def run(arguments: Arguments, console: Console | None = None) -> list[Difference]:
    """Prints a line for each checkpoint but the first."""
    console = console or Console()
    columns = ("tensors", "changed", "in bfloat16", *ENCODINGS)
    caption = "bytes as a share of all weights in bfloat16, and the speed at which a core finds them"
    table = terminal.table(None, ["checkpoint"], columns, caption=caption)
    differences = []
    for before, after in zip(arguments.checkpoints, arguments.checkpoints[1:], strict=False):
        found = difference(before, after)
        differences.append(found)
        encoded = [
            f"{size / found.whole_bytes:.2%}, {found.whole_bytes / found.seconds[encoding] / 1e9:.1f} GB/s"
            for encoding, size in found.sizes.items()
        ]
        shares = [f"{number / found.num_elements:.2%}" for number in (found.num_changed, found.num_changed_16)]
        table.add_row(after.name, f"{found.num_changed_tensors}/{found.num_tensors}", *shares, *encoded)
    console.print(table)
    return differences
