"""Records survive what interrupts them, and runs are not mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_orz.evaluation import records as module
from megatron_orz.evaluation.records import RecordFile, claim, read_identity, read_records
from tests.evaluation.test_compare import record


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    written = [record("a", 1, 0), record("b", 0, 0)]
    with RecordFile(tmp_path / "r.jsonl") as file:
        file.append(written[:1])
        file.append(written)  # the first one is there already
    assert read_records(tmp_path / "r.jsonl") == written
    with RecordFile(tmp_path / "r.jsonl") as file:
        assert list(file.records.values()) == written


def test_one_evaluation_at_a_time_writes_a_file(tmp_path: Path) -> None:
    with RecordFile(tmp_path / "r.jsonl"), pytest.raises(ValueError, match="another process is evaluating into"):
        RecordFile(tmp_path / "r.jsonl")
    with RecordFile(tmp_path / "r.jsonl") as file:
        file.append([record("a", 1)])


@pytest.mark.parametrize("cut", [1, 17, 200])
def test_half_a_line_is_dropped_and_the_next_one_begins_where_it_did(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path) as file:
        file.append([record("a", 1), record("b", 0)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_records(path) == [record("a", 1)]
    with RecordFile(path) as file:
        file.append([record("c", 1)])
    assert read_records(path) == [record("a", 1), record("c", 1)]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path) as file:
        file.append([record("a", 1)])

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.append([record("b", 1)])
        assert list(file.records) == ["a"]
    assert read_records(path) == [record("a", 1)]


def test_another_file_is_no_record(tmp_path: Path) -> None:
    for text in ('{"question": "1"}\n', "[1]\n", "no JSON\n", '{"responses": [{}]}\n'):
        (tmp_path / "r.jsonl").write_text(text)
        with pytest.raises(ValueError, match="line 1 is no record"):
            read_records(tmp_path / "r.jsonl")


def test_a_directory_belongs_to_one_run(tmp_path: Path) -> None:
    ours = {"weights": "abc", "data": {"x.json": "1"}, "path": Path("x")}
    claim(tmp_path / "out", ours)
    claim(tmp_path / "out", ours)
    assert read_identity(tmp_path / "out") == ours | {"path": "x"}
    with pytest.raises(ValueError, match=r"another weights \('abc', not 'def'\); name another"):
        claim(tmp_path / "out", ours | {"weights": "def"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[]", "is of no evaluation"),
        ("{}", "is of no evaluation"),
    ],
)
def test_another_directory_is_of_no_run(text: str | None, sentence: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / module.RUN_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"run\.json {sentence}.*; name the output directory of tools/evaluate"):
        read_identity(tmp_path)
