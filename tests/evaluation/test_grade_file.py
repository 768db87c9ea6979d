"""Generations in a file: what is added, what is left out, and that nothing is half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_orz.evaluation import grade_file as module
from megatron_orz.evaluation.grade_file import GradeReport, grade_file
from megatron_orz.rewards.verifiers import AnswerVerifier

CODE = json.dumps({"function": None, "tests": [{"input": "3", "output": "9"}]})
GOOD: list[tuple[dict[str, object], bool, str | None]] = [
    ({"response": "<answer>\\boxed{\\frac12}</answer>", "answer": "0.5", "id": 7}, True, "\\frac12"),
    ({"response": "<answer>\\boxed{4}</answer>", "answer": 4}, True, "4"),
    ({"response": "<answer>\\boxed{4}</answer>", "answer": 4.0, "finish_reason": "length"}, True, "4"),
    ({"response": "<answer>\\boxed{4}</answer>", "answer": "5", "kind": None}, False, "4"),
    ({"response": "<answer>\\boxed{(B)}</answer>", "answer": "B", "kind": "choice"}, True, "(B)"),
    (
        {"response": "```python\nprint(int(input())**2)\n```", "answer": CODE, "kind": "code"},
        True,
        "print(int(input())**2)\n",
    ),
    ({"response": "it is \\boxed{1} or \\boxed{2}", "answer": "2"}, False, None),
    ({"response": "", "answer": "2"}, False, None),
]
BAD: list[tuple[bytes, str]] = [
    (b"{", "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b"[1]", "is not an object"),
    (b'{"answer": "1"}', "no field 'response'"),
    (b'{"response": "1"}', "no field 'answer'"),
    (b'{"response": null, "answer": "1"}', "response is no text"),
    (b'{"response": "x", "answer": " "}', "answer is empty"),
    (b'{"response": "x", "answer": true}', "neither text nor a number"),
    (b'{"response": "\xff", "answer": "1"}', "not UTF-8"),
    (b'{"response": "x", "answer": "1", "kind": "essay"}', "kind 'essay' is none of"),
    (b'{"response": "x", "answer": "1", "kind": "code"}', "of kind code"),
    (b'{"response": "x", "answer": "1", "finish_reason": 3}', "finish_reason '3' is none of"),
]


@pytest.fixture(scope="module")
def verifier():
    with AnswerVerifier(timeout_s=120.0, num_workers=1) as verifier:
        yield verifier


def test_rows_are_graded_and_keep_their_fields(
    verifier: AnswerVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row, *_ in GOOD))
    faults: list[str] = []
    num_bytes: list[int] = []
    report = grade_file(source, target, verifier, on_fault=faults.append, on_row=num_bytes.append)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows == [
        {**row, "correct": correct, "extracted": extracted, "timed_out": False} for row, correct, extracted in GOOD
    ]
    assert report == GradeReport(num_read=len(GOOD), num_graded=len(GOOD), num_correct=5, num_timed_out=0)
    assert faults == []
    assert sum(num_bytes) == source.stat().st_size


def test_malformed_rows_are_named_by_line_and_counted(verifier: AnswerVerifier, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = json.dumps(GOOD[1][0]).encode()
    source.write_bytes(b"".join(line + b"\n" + good + b"\n" for line, _ in BAD))
    faults: list[str] = []
    report = grade_file(source, target, verifier, on_fault=faults.append)
    assert (report.num_read, report.num_graded, report.num_correct) == (2 * len(BAD), len(BAD), len(BAD))
    for number, (fault, (_, sentence)) in enumerate(zip(faults, BAD, strict=True)):
        assert fault.startswith(f"{source}: line {2 * number + 1}: ")
        assert sentence in fault
    assert f"{2 * len(BAD)} rows read, {len(BAD)} graded, {len(BAD)} left out" in str(report)


def test_strict_grading_ends_at_the_first_malformed_row_and_writes_nothing(
    verifier: AnswerVerifier, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(GOOD[0][0]) + "\noops\n")
    target.write_text("what was there\n")
    with pytest.raises(ValueError, match="line 2: malformed JSON"):
        grade_file(source, target, verifier, is_strict=True, on_fault=lambda fault: None)
    assert target.read_text() == "what was there\n"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    with pytest.raises(ValueError, match="no such file"):
        grade_file(tmp_path / "nowhere.jsonl", target, verifier, on_fault=lambda fault: None)


def test_a_box_outside_of_answer_tags_counts_when_asked_for(verifier: AnswerVerifier, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    responses = ["it is \\boxed{1} or \\boxed{2}", "\\boxed{2} <answer> none </answer>"]
    source.write_text("".join(json.dumps({"response": text, "answer": "2"}) + "\n" for text in responses))
    grade_file(source, target, verifier, anywhere=True, on_fault=lambda fault: None)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["response"], row["correct"], row["extracted"]) for row in rows] == [
        (responses[0], True, "2"),
        (responses[1], False, None),
    ]


def test_what_cannot_be_settled_in_time_is_told(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"response": "<answer>\\boxed{9^{9^{9^9}}}</answer>", "answer": "x+1"}))
    with AnswerVerifier(timeout_s=1.0, num_workers=1) as verifier:
        report = grade_file(source, target, verifier, on_fault=lambda fault: None)
    assert report.num_timed_out == 1
    assert json.loads(target.read_text())["timed_out"] is True
