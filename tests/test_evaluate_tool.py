"""tools/evaluate.py as a user runs it: a real model, answered, graded, recorded, resumed, shown and compared."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.types import Rollout
from tests.rollout.conftest import tiny_model

TOOL = Path(__file__).parent.parent / "tools" / "evaluate.py"
SMALL = [
    *("--fleet.kind", "local", "--fleet.max-model-tokens", "100", "--sampling.max-response-tokens", "12"),
    *("--max-prompt-tokens", "64", "--template", "short", "--num-responses", "2", "--reward.num-workers", "1"),
]
Tool = Callable[..., tuple[str, str]]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tool:
    """Runs the tool with arguments in the test's directory; what it wrote to stdout and to stderr."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evaluate_tool", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str, code: int | None = None) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", [str(TOOL), *arguments])
        capfd.readouterr()
        if code is None:
            module.main()
        else:
            with pytest.raises(SystemExit) as end:
                module.main()
            assert end.value.code == code
        return capfd.readouterr()

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A run directory with a random model, and two benchmarks."""
    tokenizer = build_tokenizer()
    model = tiny_model(tied=False, seed=1)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "run" / "final")
    tokenizer.save_pretrained(tmp_path / "run" / "final")
    rows = [f'{{"question": "{n}+1", "answer": "{n + 1}"}}' for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join([*rows[:3], "oops", *rows[3:]]) + "\n")
    item = {"prompt": [{"from": "user", "value": "2*3"}], "final_answer": "6"}
    (tmp_path / "aime2024.json").write_text(json.dumps([item]))
    return tmp_path


def test_run_resume_show_and_compare(files: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Rollout] = []
    begin = ResponseGrader.begin
    monkeypatch.setattr(ResponseGrader, "begin", lambda self, rollouts: (begun.extend(rollouts), begin(self, rollouts)))
    run = ["run", "--model", "run", "--data", "sums.jsonl", "aime2024.json", *SMALL]
    output, errors = tool(*run, "--output", "a")
    assert len(begun) == 7 * 2, "grading begins with the first answer"
    assert "sums.jsonl: line 4: malformed JSON" in errors
    assert "avg@2" in output
    assert "ORZ-32B" in output
    assert "48.1" in output
    scores = json.loads((files / "a" / "scores.json").read_text())
    assert (scores["sums"]["num_items"], scores["aime2024"]["num_items"]) == (6, 1)
    assert len(scores["sums"]["dropped"]) == 1
    records = (files / "a" / "sums.jsonl").read_text()
    assert len(records.splitlines()) == 6

    # Interrupted within the second line: the same command ends with the same records.
    (files / "a" / "sums.jsonl").write_text(records[: len(records.splitlines()[0]) + 30])
    (files / "a" / "scores.json").unlink()
    tool(*run, "--output", "a")
    assert (files / "a" / "sums.jsonl").read_text() == records
    assert json.loads((files / "a" / "scores.json").read_text()) == scores

    assert "another seed (0, not 5)" in tool(*run, "--output", "a", "--seed", "5", code=2)[1]
    assert "0 % right" in tool("show", "--input", "a", "--wrong", "2")[0]
    assert "+0.0 [+0.0, +0.0]" in tool("compare", "--first", "a", "--second", "a")[0]


def test_grade_writes_what_it_could_grade_and_names_the_rest(tmp_path: Path, tool: Tool) -> None:
    rows = ['{"response": "<answer>\\\\boxed{1/2}</answer>", "answer": "0.5"}', "oops"]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    output, errors = tool("grade", "--input", "in.jsonl", "--output", "out.jsonl")
    assert "in.jsonl: line 2: malformed JSON" in errors
    assert "2 rows read, 1 graded, 1 left out; 1 correct (100.0 %)" in output
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (row["correct"], row["extracted"], row["timed_out"]) == (True, "1/2", False)
    _, errors = tool("grade", "--input", "in.jsonl", "--output", "no.jsonl", "--strict", code=2)
    assert "error: in.jsonl: line 2" in errors
    assert not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--model", "nowhere", "--data", "sums.jsonl"], "holds no Hugging Face checkpoint"),
        (["run", "--model", "run", "--data", "nowhere.jsonl"], "no such file"),
        (["run", "--model", "run", "--data", "sums.jsonl", "sums.jsonl"], "two files of the same name"),
        (["run", "--model", "run", "--data", "sums.jsonl", "--fleet.max-model-tokens", "10"], "exceed fleet.max_model"),
        (["run", "--model", "run", "--data", "sums.jsonl", "--server", "http://127.0.0.1:9"], "cannot be reached"),
        (["run", "--model", "run", "--data", "sums.jsonl", "--strict"], "line 4: malformed JSON"),
        (["run", "--model", "run", "--data", "sums.jsonl", "--seed", "-1"], "seed -1 is negative; set it to 0 or more"),
        (["run", "--model", "run", "--data", "sums.jsonl", "--max-items", "0"], "max_items 0 is not at least 1; leave"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_written(
    files: Path, tool: Tool, arguments: list[str], sentence: str
) -> None:
    _, errors = tool(arguments[0], *SMALL, *arguments[1:], "--output", "out", code=2)
    assert sentence in " ".join(errors.replace("│", " ").split())
    assert "Traceback" not in errors
    assert not (files / "out").exists()
