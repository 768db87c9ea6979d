"""The whole curation: the trail of every row, what is kept between runs, and a death at any moment."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megatron_orz.data.curation import store as store_module
from megatron_orz.data.curation.collect import Columns
from megatron_orz.data.curation.difficulty import Difficulty
from megatron_orz.data.curation.duplicates import Duplicates
from megatron_orz.data.curation.outputs import read_decision, write_outputs
from megatron_orz.data.curation.pipeline import Curation, curate
from megatron_orz.data.curation.report import write_report
from megatron_orz.data.curation.rules import Rules
from megatron_orz.data.curation.stage import Advance, Candidate, Stage, Verdict
from megatron_orz.data.curation.store import Store

ROWS = [
    {"question": "What is 1+2?", "answer": "3", "id": 1},
    {"question": "What is 1+2?", "answer": "3", "id": 2},
    {"question": "What is 2+2?", "answer": "4", "id": 1},
    {"question": "What is 5+2?", "answer": ""},
    {"question": "Which? (A) 1 (B) 2 (C) 3", "answer": "C"},
    {"question": "What is 7+7?", "answer": "14", "extra": [1]},
    {"question": "What is 8+8?", "answer": "16"},
]


def write_files(directory: Path) -> list[Path]:
    lines = [json.dumps(row) for row in ROWS]
    (directory / "a.jsonl").write_text("\n".join([*lines[:4], "{broken", *lines[4:]]))
    (directory / "b.jsonl").write_bytes('{"question": "qué", "answer": "1"}\n'.encode("latin1"))
    (directory / "c.jsonl").write_text('{"question": "What is $1+2$?", "answer": "3", "id": 1}\n')
    return [directory / f"{name}.jsonl" for name in "abc"]


@contextmanager
def open_parity() -> Iterator[Any]:
    """A sampler of which even answers come out right as often as their tens say."""

    def sample(candidates: Sequence[Candidate], seed: int, on_response: Any) -> list[int | None]:
        return [None if candidate.answer == "16" else int(candidate.answer) % 10 for candidate in candidates]

    yield sample


def stages(store: Store, *, threshold: float = 0.8, called: list[str] | None = None) -> list[Stage]:
    difficulty = Difficulty(num_responses=4, max_pass_rate=1.0, hard_below=4, chunk_problems=1)

    def spied(name: str, judge: Any) -> Any:
        def spy(candidates: Sequence[Candidate], advance: Advance) -> Sequence[Verdict]:
            if called is not None:
                called.append(name)
            verdicts: Sequence[Verdict] = judge(candidates, advance)
            return verdicts

        return spy

    def judge_difficulty(candidates: Sequence[Candidate], advance: Advance) -> Sequence[Verdict]:
        return difficulty.judge(candidates, advance, open_sampler=open_parity, store=store, identity="parity")

    duplicates = Duplicates(threshold=threshold)
    return [
        Stage(name="rules", judge=spied("rules", Rules().judge), identity=asdict(Rules())),
        Stage(name="duplicates", judge=spied("duplicates", duplicates.judge), identity=asdict(duplicates)),
        Stage(name="difficulty", judge=spied("difficulty", judge_difficulty), identity=difficulty.settings),
    ]


@contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    yield lambda amount: None


def run(files: Sequence[Path], output: Path, **options: Any) -> Curation:
    output.mkdir(exist_ok=True)
    store = Store(output / "stages")
    curation = curate(files, stages(store, **options), columns=Columns(), store=store, progress=silent)
    write_outputs(curation, output, is_hard=lambda num_right: num_right is not None and num_right < 4)
    write_report(output / "report.html", curation, notes=["a note"])
    return curation


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_row_has_a_decision_and_a_trail(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    curation = run(files, tmp_path / "out")
    table = parquet.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert [(row["place"].removeprefix(f"{tmp_path}/"), row["outcome"]) for row in table] == [
        ("a.jsonl: line 1", "kept"),
        ("a.jsonl: line 2", "duplicate"),
        ("a.jsonl: line 3", "duplicated_id"),
        ("a.jsonl: line 4", "empty"),
        ("a.jsonl: line 5", "malformed"),
        ("a.jsonl: line 6", "multiple_choice"),
        ("a.jsonl: line 7", "kept"),
        ("a.jsonl: line 8", "long_prompt"),
        ("b.jsonl: line 1", "encoding"),
        ("c.jsonl: line 1", "duplicate"),  # an id counts within its file
    ]
    assert table[0]["trail"] == [
        "rules: stays",
        "duplicates: stays (stands for 2 more)",
        "difficulty: stays (3 of 4 responses are right)",
    ]
    assert table[1]["trail"] == [
        "rules: stays",
        f"duplicates: duplicate (of {files[0]}: line 1, similarity 1.000)",
    ]
    assert table[3]["trail"] == [f"collect: empty ({files[0]}: line 4: the answer is empty; fill it in or remove it)"]
    assert "malformed JSON" in table[4]["trail"][0]
    assert read_decision(tmp_path / "out", 2)["trail"] == [
        f"collect: duplicated_id ({files[0]}: line 3: the id '1' is that of {files[0]}: line 1, too)"
    ]
    assert [(stage.name, stage.num_in, stage.num_kept) for stage in curation.stages] == [
        ("collect", 10, 6),
        ("rules", 6, 5),
        ("duplicates", 5, 3),
        ("difficulty", 3, 2),
    ]


def test_the_files_hold_what_stays_what_is_hard_and_the_counts(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    run(files, tmp_path / "out")
    train, hard = (
        [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "hard")
    )
    first = {"question": "What is 1+2?", "answer": "3", "source": f"{files[0]}: line 1", "num_right": 3}
    second = {"question": "What is 7+7?", "answer": "14", "source": f"{files[0]}: line 7", "num_right": 4}
    assert train == [first, second]
    assert hard == [first]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["kept"]) == (10, 2)
    assert summary["files"][str(files[1])] == {"rows": 1, "kept": 0, "dropped": {"encoding": 1}}
    assert summary["stages"]["collect"]["dropped"] == {"duplicated_id": 1, "empty": 1, "encoding": 1, "malformed": 1}
    assert sum(sum(stage["dropped"].values()) for stage in summary["stages"].values()) == 8


def test_what_has_not_changed_is_not_done_again(tmp_path: Path) -> None:
    files, called = write_files(tmp_path), []
    first = run(files, tmp_path / "out", called=called)
    assert called == ["rules", "duplicates", "difficulty"]
    assert run(files, tmp_path / "out", called=called).decisions == first.decisions
    assert len(called) == 3
    run(files, tmp_path / "out", called=called, threshold=0.9)
    assert called[3:] == ["duplicates", "difficulty"]
    files[2].write_text('{"question": "What is 6+6?", "answer": "12"}\n')
    run(files, tmp_path / "out", called=called, threshold=0.9)
    assert called[5:] == ["rules", "duplicates", "difficulty"]


def test_a_damaged_stage_is_done_again(tmp_path: Path) -> None:
    files, called = write_files(tmp_path), []
    run(files, tmp_path / "out")
    expected = contents(tmp_path / "out")
    damaged = tmp_path / "out" / "stages" / "2-duplicates.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    run(files, tmp_path / "out", called=called)
    assert called == ["duplicates"]
    assert contents(tmp_path / "out") == expected


def test_a_problem_of_ten_megabytes_goes_and_leaves_an_excerpt(tmp_path: Path) -> None:
    huge = json.dumps({"question": "What is it? " * 900_000, "answer": "3"})
    (tmp_path / "a.jsonl").write_text(f"{huge}\n{json.dumps(ROWS[0])}\n{huge[:-1]}\n")
    run([tmp_path / "a.jsonl"], tmp_path / "out")
    table = parquet.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert [row["outcome"] for row in table] == ["too_long", "kept", "malformed"]
    assert table[0]["trail"] == ["rules: too_long (a problem of 10,800,000 characters; the limit is 8,000)"]
    assert all(len(row["question"]) + len(str(row["trail"])) < 4000 for row in table)


def test_strict_mode_names_the_first_bad_row(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    store = Store(tmp_path / "stages")
    with pytest.raises(ValueError, match=r"^4 of 10 rows cannot be used: .*a.jsonl: line 3: .*; or leave out --strict"):
        curate(files, stages(store), columns=Columns(), store=store, progress=silent, strict=True)


def test_a_run_killed_at_any_write_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment between a file's first byte and the next file's is tried: SIGKILL before and after each replace."""
    files = write_files(tmp_path)
    run(files, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    num_writes = len(whole)
    assert num_writes == 4 + 3 + 5, "stages, chunks of responses, outputs"
    replace = Path.replace
    for moment in range(2 * num_writes):
        output = tmp_path / f"killed-{moment}"
        child = os.fork()
        if child == 0:
            num_replaced = 0

            def replace_and_die(self: Path, target: Path, moment: int = moment) -> Path:
                nonlocal num_replaced
                if 2 * num_replaced == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                moved = replace(self, target)
                if 2 * num_replaced + 1 == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                num_replaced += 1
                return moved

            monkeypatch.setattr(store_module.Path, "replace", replace_and_die)
            try:
                run(files, output)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        for path in output.rglob("*"):
            assert path.is_dir() or path.suffix == ".unfinished" or path.read_bytes(), "no file is cut short"
        run(files, output)
        assert contents(output) == whole
