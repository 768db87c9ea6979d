"""Converts models between Hugging Face's checkpoints and Megatron's, in one process.

python tools/convert.py hf-to-megatron --input models/base --output models/base-megatron
python tools/convert.py megatron-to-hf --input runs/orz/checkpoint --output models/trained --dtype bfloat16
python tools/convert.py verify --first models/base --second models/base-megatron --text "1 + 1 ="
python tools/convert.py inspect --input models/base-megatron
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, run_command
from megatron_orz.config import DType
from megatron_orz.conversion.convert import Conversion, plan_hf_to_megatron, plan_megatron_to_hf
from megatron_orz.conversion.inspection import list_tensors
from megatron_orz.engine.dtypes import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class HFToMegatron:
    """Writes a distributed checkpoint that every layout of Megatron ranks loads.

    A checkpoint with a `score.weight` becomes a critic.
    """

    input: Path
    """Hugging Face checkpoint: config.json, safetensors, tokenizer."""
    output: Path
    """A directory that does not exist; an interrupted conversion into it is continued."""
    dtype: DType | None = None
    """Type to convert the weights to; by default every tensor keeps its own."""


@dataclass(frozen=True, kw_only=True)
class MegatronToHF:
    """Writes a Hugging Face checkpoint from a distributed checkpoint, whatever layout saved it.

    A critic becomes a token classifier with one label.
    """

    input: Path
    """Distributed checkpoint (torch_dist)."""
    output: Path
    """A directory that does not exist; an interrupted conversion into it is continued."""
    dtype: DType | None = None
    """Type to convert the weights to; by default every tensor keeps its own."""
    companions: Path | None = None
    """Directory with config.json and tokenizer; by default that of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Runs two checkpoints on a text and prints the largest difference of their outputs.

    A Hugging Face checkpoint is run by transformers, a distributed one by megatron-core. Exit code 1 means that they
    differ by more than the tolerance.
    """

    first: Path
    """Checkpoint of either form; its tokenizer reads the text."""
    second: Path
    """Checkpoint of either form."""
    text: str = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42, and 42 / 6 = 7."
    """What both models read."""
    dtype: DType = "float32"
    """Type in which both models run."""
    tolerance: float = 1e-3
    """Largest absolute difference of logits, or of a critic's values, that counts as equal."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Lists the tensors of a checkpoint of either form: shape, type and size."""

    input: Path
    """The checkpoint."""


def main() -> None:
    with plain_errors():
        code = run_command(
            {
                "hf-to-megatron": (HFToMegatron, hf_to_megatron),
                "megatron-to-hf": (MegatronToHF, megatron_to_hf),
                "verify": (Verify, verify),
                "inspect": (Inspect, inspect),
            }
        )
        sys.exit(code)


def hf_to_megatron(command: HFToMegatron) -> int:
    return convert(plan_hf_to_megatron(command.input, command.output, dtype=torch_dtype(command.dtype)))


def megatron_to_hf(command: MegatronToHF) -> int:
    dtype = torch_dtype(command.dtype)
    return convert(plan_megatron_to_hf(command.input, command.output, dtype=dtype, companions=command.companions))


def torch_dtype(name: DType | None) -> torch.dtype | None:
    return TORCH_DTYPES[name] if name else None


def convert(conversion: Conversion) -> int:
    try:
        with terminal.progress(in_bytes=True) as progress:
            task = progress.add_task(f"writing {conversion.target.name}", total=conversion.num_bytes)
            is_new = conversion.run(lambda num_bytes: progress.advance(task, num_bytes))
            progress.update(task, completed=conversion.num_bytes)
    except KeyboardInterrupt:
        print("the same command goes on from here", file=sys.stderr)
        raise
    print(conversion.target if is_new else f"{conversion.target} is complete already")
    return 0


def verify(command: Verify) -> int:
    # Importing megatron-core takes seconds.
    from transformers import AutoTokenizer

    from megatron_orz.engine.outputs import megatron_outputs, transformers_outputs
    from megatron_orz.engine.torch_dist import is_torch_dist

    token_ids = AutoTokenizer.from_pretrained(command.first, local_files_only=True, trust_remote_code=False)(
        command.text
    )["input_ids"]
    first, second = (
        (megatron_outputs if is_torch_dist(path) else transformers_outputs)(path, token_ids, command.dtype)
        for path in (command.first, command.second)
    )
    if first.shape != second.shape:
        raise ValueError(
            f"{command.first} gives outputs of shape {list(first.shape)}, {command.second} of {list(second.shape)}; "
            "name two checkpoints of the same model"
        )
    difference = float((first - second).abs().max())
    print(
        f"largest difference {difference:.3g} over {len(token_ids)} tokens; "
        f"the largest output is {float(first.abs().max()):.3g}"
    )
    return int(not difference <= command.tolerance)


def inspect(command: Inspect) -> int:
    tensors = list(list_tensors(command.input))
    table = terminal.table(None, ["tensor", "type"], ["bytes"], notes=True)
    for tensor in tensors:
        table.add_row(tensor.name, tensor.dtype, f"{tensor.num_bytes:,}", str(list(tensor.shape)))
    terminal.console().print(table)
    total = sum(tensor.num_bytes for tensor in tensors)
    print(f"{len(tensors)} tensors, {total:,} bytes ({total / 2**30:.2f} GiB)")
    return 0


if __name__ == "__main__":
    main()
