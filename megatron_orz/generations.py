"""The rollouts of a step in a parquet file, a row for each, and back.

    generations/step-000012.parquet     of the rollouts that version 12 of the policy was trained on

Files are whole or not there, and no larger than they may be: where a step's rollouts would take more, those of its last
prompts are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_orz.types import FinishReason, Swap
from megatron_orz.whole_file import whole_file

GENERATIONS = "generations"
MIB = 2**20
ROWS_TOGETHER = 64
"""Rows of a row group, which is written or left out as one."""
GROUP_BYTES = 2**13
"""More than a row group adds to what its rows take: the headers of its columns, and its part of the footer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One rollout, for people and for analysis."""

    step: int
    prompt_id: int
    source: str
    """Name of the data file the problem comes from."""
    prompt: str
    response: str
    answer: str
    """The reference."""
    extracted: str | None
    reward: float
    is_correct: bool
    is_formatted: bool
    timed_out: bool
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_response_tokens: int
    policy_version: int
    """Of the weights that sampled the first token."""
    swaps: tuple[Swap, ...] = ()
    """Where newer weights took over, in order. A file may lack them: it tells of none."""
    reflection: list[str]
    """The reflection patterns it holds."""
    repetition: float
    prompt_ids: list[int]
    response_ids: list[int]


SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "prompt_id": pa.int64(),
        "source": pa.string(),
        "prompt": pa.string(),
        "response": pa.string(),
        "answer": pa.string(),
        "extracted": pa.string(),
        "reward": pa.float32(),
        "is_correct": pa.bool_(),
        "is_formatted": pa.bool_(),
        "timed_out": pa.bool_(),
        "finish_reason": pa.string(),
        "num_prompt_tokens": pa.int32(),
        "num_response_tokens": pa.int32(),
        "policy_version": pa.int32(),
        "swaps": pa.list_(pa.struct([("token", pa.int32()), ("version", pa.int32())])),
        "reflection": pa.list_(pa.string()),
        "repetition": pa.float32(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
    }
)
assert SCHEMA.names == [field.name for field in fields(Generation)]


def generations_file(run_dir: Path, step: int) -> Path:
    """Where the rollouts of a step are."""
    return run_dir / GENERATIONS / f"step-{step:06d}.parquet"


def write_generations(generations: Sequence[Generation], path: Path, *, max_mib: float) -> int:
    """Writes as many of them as fit into `max_mib`, whole or not at all; returns how many were left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_written = 0
    with whole_file(path) as file, _writer(file) as writer:
        for group, first in enumerate(range(0, len(generations), ROWS_TOGETHER)):
            table = _to_table(generations[first : first + ROWS_TOGETHER])
            # Encoded and compressed, its rows take no more than they do in memory.
            if file.tell() + table.nbytes + (group + 2) * GROUP_BYTES > max_mib * MIB:
                break
            writer.write_table(table)
            num_written += table.num_rows
    return len(generations) - num_written


def read_generations(path: Path) -> Iterator[Generation]:
    """The rows of a file, in order. Raises ValueError for what is no file of generations."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := set(SCHEMA.names) - {"swaps"} - set(file.schema_arrow.names):
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; give a file of {GENERATIONS}/")
            for batch in file.iter_batches(batch_size=ROWS_TOGETHER, columns=SCHEMA.names):
                yield from map(_generation, batch.to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}; give a file of {GENERATIONS}/") from error


def find_generations(path: Path) -> list[Path]:
    """The files of a run directory in the order of its steps, or the one file that `path` names.

    Raises ValueError where there are none.
    """
    files = [path] if path.is_file() else sorted((path / GENERATIONS).glob("step-*.parquet"))
    if not files:
        raise ValueError(
            f"{path} is neither a file of generations nor the directory of a run that saved any; "
            "set generations.interval to 1 or more for a run to save them"
        )
    return files


def _generation(row: dict[str, Any]) -> Generation:
    return Generation(**row | {"swaps": tuple(Swap(**swap) for swap in row.get("swaps", ()))})


def _writer(file: BinaryIO) -> pq.ParquetWriter:
    # Statistics would repeat the first bytes of prompts and responses.
    return pq.ParquetWriter(file, SCHEMA, compression="zstd", write_statistics=False)


def _to_table(generations: Sequence[Generation]) -> pa.Table:
    columns = {name: [getattr(generation, name) for generation in generations] for name in SCHEMA.names}
    for name in ("source", "prompt", "response", "answer", "extracted"):
        # JSON can name halves of characters, which no encoding has.
        columns[name] = [text and text.encode(errors="replace").decode() for text in columns[name]]
    return pa.table(columns, schema=SCHEMA)
