"""Trackers get what is recorded. Those that are installed run for real, without a network."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from megatron_orz.config import Tracker, TrackingConfig
from megatron_orz.logs import RunLog
from megatron_orz.trackers import Trackers, check_trackers
from tests.test_logs import example_config


class Recorder(ModuleType):
    """A module with the trackers' interface that remembers its calls, and may refuse to start."""

    def __init__(self, name: str, *, refuses: bool = False) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.refuses = refuses

    def init(self, **options: Any) -> None:
        if self.refuses:
            raise KeyError("no login")
        self.calls.append(("init", options))

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self.calls.append(("log", (step, metrics)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def record_two_steps(run_dir: Path, *trackers: Tracker, is_main: bool = True) -> None:
    config = replace(example_config(run_dir), tracking=TrackingConfig(trackers=trackers, project="sums"))
    with RunLog(run_dir, num_steps=2, is_main=is_main, console=Console(file=io.StringIO())) as log:
        log.start_trackers(config)
        log.record(0, {"reward/mean": 0.25})
        log.record(1, {"reward/mean": 0.5})


def test_every_tracker_gets_the_config_and_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: Recorder(name) for name in ("wandb", "trackio")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    run_dir = tmp_path / "first"
    record_two_steps(run_dir, "wandb", "trackio")
    for name, module in modules.items():
        (kind, options), *others = module.calls
        assert kind == "init"
        assert (options["project"], options["name"]) == ("sums", "first")
        assert options["config"]["ppo"]["num_steps"] == 3
        assert options.get("dir") == (str(run_dir) if name == "wandb" else None)
        assert others == [
            ("log", (0, {"reward/mean": 0.25})),
            ("log", (1, {"reward/mean": 0.5})),
            ("finish", None),
        ]


def test_other_ranks_track_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    record_two_steps(tmp_path, "wandb", is_main=False)
    assert module.calls == []


def test_one_that_does_not_start_is_named_and_the_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Recorder("wandb"), Recorder("trackio", refuses=True)
    monkeypatch.setitem(sys.modules, "wandb", first)
    monkeypatch.setitem(sys.modules, "trackio", second)
    config = replace(example_config(tmp_path), tracking=TrackingConfig(trackers=("wandb", "trackio")))
    with pytest.raises(RuntimeError, match=r"cannot start trackio: 'no login'; log in, or leave it out of tracking"):
        Trackers(config)
    assert [kind for kind, _ in first.calls] == ["init", "finish"]


def test_one_that_is_not_installed_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"names trackio, which is not installed; pip install megatron_orz\[trackio\]"):
        check_trackers(["trackio"])
    check_trackers([])


@pytest.mark.parametrize(
    ("values", "message"),
    [({"trackers": ("wandb", "wandb")}, "names one twice"), ({"project": ""}, "tracking.project is empty")],
)
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**values)


@pytest.mark.slow
def test_wandb_keeps_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record_two_steps(tmp_path, "wandb")
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # A process of its own writes the file, and may end a moment later.
    texts, deadline = (b"reward/mean", b"0.25", b"max_response_tokens"), time.monotonic() + 30
    while missing := [text for text in texts if text not in recorded.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


@pytest.mark.slow
def test_trackio_keeps_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    record_two_steps(tmp_path / "run", "trackio")
    (database,) = tmp_path.glob("trackio/*.db")
    assert b"reward/mean" in database.read_bytes()
