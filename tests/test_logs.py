"""What a run writes and prints, and what happens when it cannot."""

import io
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.logs import LogPosition, RunDirectoryError, RunLog, console_line, read_metrics, set_aside


def quiet_log(run_dir: Path, **options: Any) -> RunLog:
    return RunLog(run_dir, num_steps=10, console=Console(file=io.StringIO()), **options)


def printed(log: RunLog) -> str:
    assert isinstance(log.console.file, io.StringIO)
    return log.console.file.getvalue()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow past num_bytes: a full disk, as far as a writer can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_recorded_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    log.record(1, {"reward/mean": 0.25, "policy/entropy": 1.5})
    log.record(2, {"reward/mean": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.25, "policy/entropy": 1.5},
        {"step": 2, "reward/mean": 0.5},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    log.close()


def test_a_distribution_is_a_histogram_of_the_next_record_alone(tmp_path: Path) -> None:
    with quiet_log(tmp_path) as log:
        log.distribution("response/correct_length", [1, 1, 2, 10])
        log.distribution("response/wrong_length", [])
        log.record(1, {"reward/mean": 0.25})
        log.record(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["histograms"] == ["response/correct_length"]
    (event,) = events.Histograms("response/correct_length")
    histogram = event.histogram_value
    assert (event.step, histogram.min, histogram.max, histogram.num) == (1, 1, 10, 4)
    assert (histogram.sum, histogram.sum_squares) == (14, 106)
    # Bins of (10 - 1) / 30: 1 and 1 in the first, 2 in the fourth, 10 in the last, which holds its upper edge.
    assert {i: count for i, count in enumerate(histogram.bucket) if count} == {0: 2, 3: 1, 29: 1}
    assert histogram.bucket_limit[0] == pytest.approx(1.3)
    assert histogram.bucket_limit[-1] == pytest.approx(10)
    assert all(row.keys() == {"step", "reward/mean"} for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with quiet_log(tmp_path) as log:
        log.record(1, {"critic/explained_variance": math.nan, "policy/loss": math.inf, "reward/mean": 1.0})
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert row["critic/explained_variance"] is row["policy/loss"] is None
    assert row["reward/mean"] == 1.0
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["critic/explained_variance"])


def test_a_resumed_run_appends_and_reads_as_one(tmp_path: Path) -> None:
    with quiet_log(tmp_path) as log:
        log.record(1, {"reward/mean": 0.1, "evaluation/digits/avg@4": 0.3})
        log.record(2, {"reward/mean": 0.2})
        log.record(3, {"reward/mean": 0.3})
    with quiet_log(tmp_path) as log:
        log.record(2, {"reward/mean": 0.25})
        log.record(1, {"policy/entropy": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.1, "evaluation/digits/avg@4": 0.3, "policy/entropy": 2.0},
        {"step": 2, "reward/mean": 0.25},
        {"step": 3, "reward/mean": 0.3},
    ]


def test_a_new_run_sets_an_earlier_one_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    moved = []
    for reward in (0.1, 0.2, 0.3):
        moved.append(set_aside(run_dir))
        with quiet_log(run_dir) as log:
            log.record(1, {"reward/mean": reward})
    assert moved == [None, tmp_path / "run-1", tmp_path / "run-2"]
    rewards = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["reward/mean"] for name in ("run-1", "run-2", "run")]
    assert rewards == [0.1, 0.2, 0.3]


def test_a_directory_without_a_run_stays(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a run")
    assert set_aside(tmp_path) is None
    assert (tmp_path / "notes").exists()


def test_half_a_line_left_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "rew')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with quiet_log(tmp_path) as log:
        log.record(2, {"reward/mean": 0.75})
    assert [row["reward/mean"] for row in read_metrics(path)] == [0.5, 0.75]


def test_a_resumed_log_reads_as_if_nothing_had_interrupted_it(tmp_path: Path) -> None:
    with quiet_log(tmp_path) as log:
        for step in range(3):
            log.record(step, {"reward/mean": float(step)})
        position = LogPosition(3, log.flush())
        log.record(3, {"reward/mean": -1.0})
        log.record(4, {"reward/mean": -1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    with quiet_log(tmp_path, goes_on_at=position) as log:
        log.record(3, {"reward/mean": 3.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward/mean"] for line in lines] == [0.0, 1.0, 2.0, 3.0]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(n, float(n)) for n in range(4)]


def test_rows_that_are_missing_where_a_log_goes_on_are_not_made_up(tmp_path: Path) -> None:
    with quiet_log(tmp_path, goes_on_at=LogPosition(3, 1000)) as log:
        log.record(3, {"reward/mean": 3.0})
        assert "metrics.jsonl lacks rows before step 3: 0 of 1000 bytes are there" in printed(log)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3]


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path: Path) -> None:
    log = quiet_log(tmp_path)
    log.record(1, {"reward/mean": 0.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        largest_file(len(before) + 10),
        pytest.raises(RunDirectoryError, match=r"^cannot write .*; free some space or set run_dir .*$"),
    ):
        log.record(2, {"reward/mean": 0.75})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.record(2, {"reward/mean": 0.75})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    log.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*file.*: Not a directory; "):
        quiet_log(tmp_path / "file" / "run")


def test_spans_add_up_until_the_next_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    log = quiet_log(tmp_path)
    with log.span("generate"):
        pass
    with pytest.raises(KeyError), log.span("reward"):
        raise KeyError
    with log.span("generate"):
        pass
    log.record(1, {})
    with log.span("sync"):
        pass
    log.record(2, {})
    monkeypatch.undo()
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "time/generate_s": 5.5, "time/reward_s": 0.25},
        {"step": 2, "time/sync_s": 1.0},
    ]
    assert printed(log).splitlines() == ["step  1/10  time 5.8 s", "step  2/10  time 1.0 s"]


def test_gauges_are_read_at_every_record(tmp_path: Path) -> None:
    restarts = iter([0.0, 2.0])
    with quiet_log(tmp_path) as log:
        log.include(lambda: {"fleet/restarts": next(restarts)})
        log.record(1, {"reward/mean": 0.5})
        log.record(2, {})
    assert [row["fleet/restarts"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 2.0]


def test_other_ranks_write_and_print_nothing(tmp_path: Path) -> None:
    with quiet_log(tmp_path / "run", is_main=False) as log:
        with log.span("generate"), log.progress("generate", total=2) as advance:
            advance()
        log.write_config(example_config(tmp_path))
        log.record(1, {"reward/mean": 1.0})
    assert not (tmp_path / "run").exists()


def test_the_line_of_a_step_has_a_fixed_order_and_stays_whole(tmp_path: Path) -> None:
    metrics = {
        "tokens_per_s": 12345.6,
        "critic/loss": 0.01234,
        "evaluation/digits/avg@4": 0.5,
        "reward/mean": 0.4567,
        "response/length_mean": 31.4,
        "response/format_share": 0.98,
        "time/generate_s": 2.0,
        "time/policy_s": 0.5,
    }
    with quiet_log(tmp_path) as log:
        log.record(3, metrics)
    line = (
        "step  3/10  reward 0.457  length    31 tok  format  98 %  value loss 0.0123  speed 12,346 tok/s"
        "  digits/avg@4 50.0 %  time 2.5 s"
    )
    assert printed(log) == line + "\n"
    assert console_line(3, 10, dict(reversed(metrics.items()))).plain == line


def test_progress_is_drawn_on_terminals_only(tmp_path: Path) -> None:
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal)
        with RunLog(tmp_path, num_steps=1, console=console) as log, log.progress("generate", total=2) as advance:
            advance()
            advance()
        assert isinstance(console.file, io.StringIO)
        assert ("2/2" in console.file.getvalue()) == is_terminal


def test_the_comparison_shows_both_scores_and_the_change(tmp_path: Path) -> None:
    with quiet_log(tmp_path) as log:
        log.print_comparison(
            {"evaluation/digits/avg@4": 0.25, "evaluation/digits/length_mean": 40.0, "reward/mean": 9.0},
            {"evaluation/digits/avg@4": 0.875, "evaluation/digits/length_mean": 30.5, "evaluation/new/avg@4": 0.5},
        )
    rows = [line.split() for line in printed(log).splitlines()]
    assert ["digits/avg@4", "25.0", "%", "87.5", "%", "+62.5", "pp"] in rows
    assert ["digits/length_mean", "40", "30.5", "-9.5"] in rows
    assert ["new/avg@4", "-", "50.0", "%", "-"] in rows
    assert "reward" not in printed(log)


def example_config(run_dir: Path) -> Config:
    path, optimizer = Path("base"), OptimizerConfig(lr=1e-6)
    return Config(
        run_dir=run_dir,
        policy=ModelConfig(path=path, optimizer=optimizer),
        critic=CriticConfig(path=path, optimizer=optimizer),
        ppo=PPOConfig(num_steps=3),
        sampling=SamplingConfig(max_response_tokens=32),
        data=DataConfig(train=(Path("train.jsonl"),)),
    )


def test_the_config_is_written_whole_beside_the_run(tmp_path: Path) -> None:
    with quiet_log(tmp_path) as log:
        log.write_config(example_config(tmp_path))
        log.write_config(example_config(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["ppo"]["num_steps"] == 3
    assert written["policy"]["path"] == "base"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "tensorboard"]
