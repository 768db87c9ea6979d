"""Generations on disk: what is written is read, within the size that is allowed, whole or not at all."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_orz import generations
from megatron_orz.generations import (
    Generation,
    find_generations,
    generations_file,
    read_generations,
    write_generations,
)
from megatron_orz.types import Swap

MIB = 2**20
ONE = Generation(
    step=3,
    prompt_id=2**40,
    source="train",
    prompt="1 + 1 =",
    response="⟨2⟩\n\x1b[31m",
    answer="2",
    extracted=None,
    reward=0.5,
    is_correct=True,
    is_formatted=False,
    timed_out=True,
    finish_reason="length",
    num_prompt_tokens=3,
    num_response_tokens=2,
    policy_version=2,
    swaps=(Swap(1, 3), Swap(2**20, 7)),
    reflection=["wait,"],
    repetition=0.25,
    prompt_ids=[1, 2, 3],
    response_ids=[2**17, 0],
)


def random_generations(number: int, num_tokens: int) -> list[Generation]:
    """Hardly compressible."""
    draw = random.Random(0)
    return [
        replace(
            ONE,
            prompt_id=i,
            response="".join(chr(draw.randrange(33, 1000)) for _ in range(num_tokens)),
            response_ids=[draw.randrange(2**31) for _ in range(num_tokens)],
        )
        for i in range(number)
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = generations_file(tmp_path, 3)
    empty = replace(ONE, extracted="", reflection=[], response="", response_ids=[], swaps=())
    rows = [ONE, empty, *random_generations(200, 9)]
    assert write_generations(rows, path, max_mib=1) == 0
    assert list(read_generations(path)) == rows
    assert [file.name for file in path.parent.iterdir()] == ["step-000003.parquet"]


@pytest.mark.parametrize("max_kib", [16, 60, 200, 1000, 3000])
@pytest.mark.parametrize("num_tokens", [0, 10, 1000])
def test_a_file_is_no_larger_than_it_may_be_and_holds_the_first_rows(
    tmp_path: Path, max_kib: int, num_tokens: int
) -> None:
    path = tmp_path / "some.parquet"
    rows = random_generations(500, num_tokens)
    left_out = write_generations(rows, path, max_mib=max_kib / 1024)
    assert path.stat().st_size <= max_kib * 1024
    assert list(read_generations(path)) == rows[: 500 - left_out]
    if left_out:
        assert path.stat().st_size > max_kib * 1024 - 450_000, "a group of rows that fits was left out"


def test_an_error_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.parquet"
    write_generations([ONE], path, max_mib=1)

    def full(rows: list[Generation]) -> pa.Table:
        raise OSError("no space left")

    monkeypatch.setattr(generations, "_to_table", full)
    with pytest.raises(OSError, match="no space left"):
        write_generations([ONE, ONE], path, max_mib=1)
    assert list(read_generations(path)) == [ONE]
    assert [file.name for file in tmp_path.iterdir()] == ["some.parquet"]


def test_halves_of_characters_do_not_lose_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    write_generations([replace(ONE, answer="\ud83d = 2")], path, max_mib=1)
    assert next(read_generations(path)).answer == "? = 2"


def test_files_of_a_run_come_in_the_order_of_its_steps(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write_generations([ONE], generations_file(tmp_path, step), max_mib=1)
    files = find_generations(tmp_path)
    assert [file.stem for file in files] == ["step-000009", "step-000010", "step-000100"]
    assert find_generations(files[1]) == [files[1]]


def test_a_file_without_swaps_tells_of_none(tmp_path: Path) -> None:
    write_generations([ONE], tmp_path / "some.parquet", max_mib=1)
    pq.write_table(pq.read_table(tmp_path / "some.parquet").drop_columns(["swaps"]), tmp_path / "other.parquet")
    assert list(read_generations(tmp_path / "other.parquet")) == [replace(ONE, swaps=())]


def test_what_holds_no_generations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a file of generations nor .* generations.interval"):
        find_generations(tmp_path)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"text.parquet cannot be read as parquet: .*; give a file of generations/"):
        list(read_generations(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"response": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet has no column answer, extracted, .*; give a file"):
        list(read_generations(tmp_path / "other.parquet"))
