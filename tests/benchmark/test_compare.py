"""Comparison of two files of figures, and the table of all of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_orz.benchmark import compare, summary
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.results import FOLDER

ENVIRONMENT = {
    "device": "a CPU",
    "torch": "2",
    "commit": "0123456789abcdef",
    "time": "now",
    "command": "python tools/benchmark.py train",
}


def write(path: Path, ours: list[float], theirs: list[float]) -> Path:
    rows = {OURS: {"times_s": ours, "tokens_per_s": 10 / ours[0]}, "HF packed": {"times_s": theirs}}
    group: dict[str, Any] = {
        "task": "policy",
        "shape": "small",
        "rows": rows,
        "targets": [{"text": "at least 1.1 times as fast as HF packed", "value": 1.0, "is_met": False}],
    }
    path.write_text(json.dumps({"environment": ENVIRONMENT, "groups": [group]}))
    return path


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1.2, 1.21, 1.22], [2.0, 2.0, 2.0], "slower"),
        ([1.2, 1.21, 1.22], [2.4, 2.4, 2.4], ""),  # the whole machine became slower
        ([1.0, 1.01, 1.02], [2.4, 2.4, 2.4], "faster"),
        ([1.0, 1.3, 1.4], [2.0, 2.0, 2.0], ""),  # one run is as fast as any before
        ([1.03, 1.03, 1.03], [2.0, 2.0, 2.0], ""),  # less than any change that counts
        ([0.8, 0.8, 0.9], [2.0, 2.0, 2.0], "faster"),
    ],
)
def test_changes_beyond_the_noise_and_the_machine(
    ours: list[float], theirs: list[float], verdict: str, tmp_path: Path
) -> None:
    before = write(tmp_path / "before.json", [1.0, 1.01, 1.02], [2.0, 2.0, 2.0])
    after = write(tmp_path / "after.json", ours, theirs)
    change, _ = compare.changes(before, after)
    assert change.verdict == verdict
    arguments = compare.Arguments(before=before, after=after)
    written = io.StringIO()
    if verdict == "slower":
        with pytest.raises(SystemExit, match="1 of ours became slower"):
            compare.main(arguments, Console(file=written))
    else:
        compare.main(arguments, Console(file=written))
    assert (verdict in written.getvalue()) or not verdict


def test_files_of_nothing_in_common_are_refused(tmp_path: Path) -> None:
    before = write(tmp_path / "before.json", [1.0], [2.0])
    after = tmp_path / "after.json"
    after.write_text(json.dumps({"environment": ENVIRONMENT, "groups": []}))
    with pytest.raises(ValueError, match="have no task, shape and implementation in common"):
        compare.changes(before, after)
    after.write_text("{}")
    with pytest.raises(ValueError, match="has no environment"):
        compare.changes(before, after)
    with pytest.raises(ValueError, match="cannot be read"):
        compare.changes(before, tmp_path / "absent.json")


def test_the_table_has_a_line_for_each_baseline_of_a_target(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", [1.0, 2.0, 3.0], [4.0, 4.0, 5.0])
    assert list(summary.rows(path)) == [
        "| a CPU | policy, small | 10 tokens/s | HF packed: 4 s | 2.00 | `tools/benchmark.py train` | 012345678 |"
    ]


def test_the_fastest_other_stands_beside_the_baseline_of_a_target(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", [1.0, 2.0, 3.0], [4.0, 4.0, 5.0])
    results = json.loads(path.read_text())
    group = results["groups"][0]
    group["rows"]["compiled"] = {"times_s": [1.0], "extra_bytes": 3 << 20}
    group["rows"]["slower"] = {"times_s": [5.0]}
    path.write_text(json.dumps(results))
    baseline, fastest = summary.rows(path)
    assert "| HF packed: 4 s | 2.00 |" in baseline
    assert "| compiled: 1 s, 3 MiB | 0.50 |" in fastest
    group["targets"] = [{"text": "at least 80% of the floor", "value": 0.9, "is_met": True}]
    path.write_text(json.dumps(results))
    assert list(summary.rows(path)) == [fastest]


def test_all_committed_figures_can_be_read() -> None:
    for path in FOLDER.glob("*.json"):
        assert list(summary.rows(path)), path
        assert all(change.verdict == "" for change in compare.changes(path, path))
