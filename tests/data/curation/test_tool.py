"""tools/curate.py as a user meets it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from megatron_orz.data.reading import read_problems
from megatron_orz.data.synthetic import build_tokenizer
from tests.engine import tiny

TOOL = Path("tools/curate.py")


def curate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that is refused says: one sentence without a traceback, and exit code 2."""
    with pytest.raises(SystemExit) as end:
        curate(monkeypatch, *arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(re.sub("[│╭╮╰╯─|+-]{2,}|[│|]", " ", error).split())  # without the frame that tyro draws


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_problems_are_made_curated_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, output = tmp_path / "made.jsonl", tmp_path / "data"
    curate(monkeypatch, "synthesize", "--task", "logic", "--level", 2, "--num-problems", 30, "--output", made)
    assert capsys.readouterr().out == f"30 problems in {made}\n"
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[:3])
    more = write_rows(tmp_path / "more.jsonl", [rows[5], {"question": "q"}, {"question": "What?", "answer": "x^2+"}])

    command = ["run", "--input", made, more, "--output", output, "--evaluation", held_out, "--verifier.timeout-s", 60]
    # Puzzles with the same people share most of their words.
    command += ["--duplicates.threshold", 1, "--decontamination.max-overlap", 0.99]
    curate(monkeypatch, *command)
    printed = capsys.readouterr().out
    assert "27 of 33 rows stay" in printed
    assert "missing_column 1" in printed
    assert "note: No pass rates" in printed
    kept = [(problem.text, problem.answer) for problem in read_problems(output / "train.jsonl")]
    assert kept == [(row["question"], row["answer"]) for row in rows[3:]]

    curate(monkeypatch, "explain", "--output", output, "--row", 30)
    assert f"duplicates: duplicate (of {made}: line 6, similarity 1.000)" in capsys.readouterr().out
    curate(monkeypatch, "explain", "--output", output, "--row", 32)
    assert "answers: unverifiable (the verifier cannot read the answer 'x^2+')" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2"}])
    run = ["run", "--output", tmp_path / "out", "--input"]
    for arguments, message in [
        ([*run, tmp_path / "none.jsonl"], "none.jsonl: no such file or directory; name one that exists"),
        ([*run, TOOL], "curate.py: unknown kind of file '.py'"),
        ([*run, rows, "--evaluation", tmp_path / "none.json"], "none.json: no such file"),
        ([*run, rows, "--difficulty.model", tmp_path], "holds no config.json; name a Hugging Face checkpoint"),
        ([*run, rows, "--difficulty.template", "shrot"], "template 'shrot' is neither a built-in name"),
        ([*run, rows, "--languages.keep", "english"], "languages.keep holds english; use ISO 639-1 codes"),
        ([*run, rows, "--duplicates.threshold", 0.2], "duplicates.threshold 0.2 is outside [0.5, 1]"),
        ([*run, tmp_path / "out"], "no such file"),
        (["explain", "--output", tmp_path, "--row", 0], "decisions.parquet: no such file"),
        (
            ["synthesize", "--task", "chess", "--level", 1, "--num-problems", 1, "--output", tmp_path / "x.jsonl"],
            "task 'chess' is none of arithmetic, countdown, logic",
        ),
    ]:
        assert message in error_of(monkeypatch, capsys, *arguments)
    assert not (tmp_path / "x.jsonl").exists()


def test_strict_mode_ends_at_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2"}, {"question": "1+1?", "answer": ""}]
    )
    with pytest.raises(SystemExit) as end:
        curate(monkeypatch, "run", "--input", rows, "--output", tmp_path / "out", "--strict")
    assert end.value.code == 2
    assert f"error: 1 of 2 rows cannot be used: {rows}: line 2: the answer is empty" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_two_curations_into_one_output_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2"}])
    with FileLock(tmp_path / ".lock"):
        error = error_of(monkeypatch, capsys, "run", "--input", rows, "--output", tmp_path)
    assert "another process is curating into" in error


@pytest.mark.parametrize("command", [[], ["run"], ["explain"], ["synthesize"]])
def test_help_shows_examples_or_options(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        curate(monkeypatch, *command, "--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert ("--output" in printed) if command else ("python tools/curate.py run --input" in printed)


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
def test_a_process_killed_while_it_samples_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """A real model through the local fleet; killed once some chunks of responses are there and others are not."""
    tokenizer = build_tokenizer()
    tiny.save_model(tmp_path / "hf", family="qwen2", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "hf")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(120)])

    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, TOOL, "run", "--input", rows, "--output", output, "--dtype", "float32"]
        command += ["--difficulty.model", tmp_path / "hf", "--difficulty.template", "short", "--fleet.kind", "local"]
        command += ["--difficulty.num-responses", 16, "--difficulty.chunk-problems", 8, "--difficulty.min-right", 0]
        command += ["--sampling.max-response-tokens", 60, "--difficulty.max-prompt-tokens", 40]
        command += ["--encoder", tmp_path / "hf", "--paraphrases.threshold", 0.999]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=500) == 0
    killed = start(tmp_path / "killed")
    responses = tmp_path / "killed" / "stages" / "responses"
    deadline = time.monotonic() + 300
    while not (responses.is_dir() and len(list(responses.glob("*.parquet"))) >= 3):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert not (tmp_path / "killed" / "train.jsonl").exists()
    chunks = {path: path.stat().st_mtime_ns for path in responses.glob("*.parquet")}
    assert 3 <= len(chunks) < 15
    assert start(tmp_path / "killed").wait(timeout=500) == 0
    assert {path: path.stat().st_mtime_ns for path in chunks} == chunks, "what was sampled is not sampled again"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
