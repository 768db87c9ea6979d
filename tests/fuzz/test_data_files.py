"""Whatever a data file holds: problems come out of it, or one ValueError that names the file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_orz.data.reading import RowError, read_rows
from megatron_orz.logs import read_metrics
from tests.data.test_forms import GPQA, TESTS, live_code_bench
from tests.fuzz.inputs import altered, damaged, fuzz, json_values, refusal, sizes

TRAINING = [
    [{"from": "human", "value": "1+1"}, {"from": "assistant", "ground_truth": {"value": "2"}}],
    [{"from": "human", "value": "2+2"}, {"from": "assistant", "ground_truth": {"value": 4}}],
]
EVALUATION = [{"prompt": [{"from": "user", "value": "1+1"}], "final_answer": "2"}]
ROWS = [{"question": "1+1", "answer": "#### 2"}, {"question": "2+2", "answer": 4.0}]
FORMS = [
    GPQA,
    {"question": "2+2", "choices": ["3", "4"], "answer": 1},
    {"question": "Add one.", "tests": TESTS, "function": "add"},
    live_code_bench(json.dumps(TESTS), '{"func_name": "add"}'),
    {"question": "Add one.", "answer": json.dumps({"function": None, "tests": TESTS}), "kind": "code"},
]


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


def lines(rows: Any) -> bytes:
    return b"\n".join(encoded(row) for row in rows) if isinstance(rows, list) else encoded(rows)


json_files = (
    st.one_of(altered(TRAINING), altered(EVALUATION), json_values).map(encoded)
    | damaged(encoded(TRAINING))
    | damaged(encoded(EVALUATION))
    | st.integers(1, 50_000).map(lambda depth: b"[" * depth)
)
jsonl_files = (
    st.one_of(altered(ROWS), altered(FORMS)).map(lines)
    | damaged(lines(ROWS))
    | st.binary(max_size=60)
    | json_values.map(encoded)
)


@sizes(slow=8_000)
def test_json(num_inputs: int, tmp_path: Path) -> None:
    fuzz(json_files, partial_named(check_rows, tmp_path / "data.json"), num_inputs=num_inputs)


@sizes(slow=8_000)
def test_jsonl(num_inputs: int, tmp_path: Path) -> None:
    fuzz(jsonl_files, partial_named(check_rows, tmp_path / "data.jsonl"), num_inputs=num_inputs)


def check_rows(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for row in read_rows(path):
        if isinstance(row, RowError):
            assert str(row).startswith(str(path))
        else:
            row.text.encode()
            row.answer.encode()
            assert row.text.strip()


@sizes(slow=4_000)
def test_metrics(num_inputs: int, tmp_path: Path) -> None:
    whole = lines([{"step": 0, "reward/mean": 0.5}, {"step": 1, "reward/mean": None}]) + b"\n"
    fuzz(damaged(whole), partial_named(check_metrics, tmp_path / "metrics.jsonl"), num_inputs=num_inputs)


def check_metrics(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    message = refusal(lambda: read_metrics(path))
    if message is not None:
        assert str(path) in message
        return
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def partial_named(check: Any, path: Path) -> Any:
    """A check of content for a path, which keeps its name."""
    bound = partial(check, path)
    bound.__qualname__ = f"{check.__qualname__}{path.suffix}"  # type: ignore[attr-defined]
    return bound
