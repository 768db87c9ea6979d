from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_orz.timeline import Timeline, draw_timeline, read_spans


def test_spans_are_on_disk_as_they_end_and_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    timeline.on_trainer("sync", 100.0, 100.5)
    timeline.on_servers("generate ahead", 100.5, 102.0)
    timeline.on_trainer("policy", 100.75, 101.75)
    expected = [
        ("trainer", "sync", 0.0, 0.5),
        ("servers", "generate ahead", 0.5, 1.5),
        ("trainer", "policy", 0.75, 1.0),
    ]
    assert read_spans(path) == expected  # a run that is killed leaves the file like this
    timeline.close()
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    assert events[0] == {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "trainer"}}
    assert events[3] == {"ph": "X", "name": "generate ahead", "pid": 0, "tid": 1, "ts": 100_500_000, "dur": 1_500_000}
    draw_timeline(path, tmp_path / "timeline.png")
    with Image.open(tmp_path / "timeline.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24) or []
    bars = {(31, 119, 180), (255, 127, 14), (44, 160, 44)}  # the first three of matplotlib's cycle, one a kind
    assert bars <= {colour for _, colour in colours}


def test_a_resumed_run_goes_on_with_its_timeline(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    for start in (10.0, 20.0):
        with Timeline(path) as timeline:
            timeline.on_trainer("sync", start, start + 1)
        with path.open("a") as file:
            file.write('{"ph": "X", "na')  # a machine that went down
    assert read_spans(path) == [("trainer", "sync", 0.0, 1.0), ("trainer", "sync", 10.0, 1.0)]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot write .*timeline\.json: No such file.*; free some space or change"):
        Timeline(tmp_path / "missing" / "timeline.json")


def test_what_is_no_timeline_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "timeline.json").write_text("nonsense")
    with pytest.raises(ValueError, match="is no timeline"):
        read_spans(tmp_path / "timeline.json")
