"""What a run tells and leaves behind in its directory.

    metrics.jsonl    a row per step: `step` and the metrics, appended whole; null is what is not a finite number
    tensorboard/     the same, for TensorBoard
    config.json      the resolved config

Metrics are named `group/name`. They arrive already averaged over ranks; only the main rank writes and speaks.
"""

import io
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_orz.config import Config, to_json
from megatron_orz.types import Metrics

METRICS_FILE = "metrics.jsonl"

CONSOLE_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward/mean", "reward", lambda x: f"{x:.3f}"),
    ("response/length_mean", "length", lambda x: f"{x:5.0f} tok"),
    ("response/format_share", "format", lambda x: f"{100 * x:3.0f} %"),
    ("response/truncated_share", "cut", lambda x: f"{100 * x:3.0f} %"),
    ("policy/entropy", "entropy", lambda x: f"{x:.3f} nat"),
    ("policy/grad_norm", "policy grad", lambda x: f"{x:.2e}"),
    ("critic/loss", "value loss", lambda x: f"{x:.4f}"),
    ("critic/explained_variance", "explained", lambda x: f"{x:6.3f}"),
    ("log_prob_mismatch/max", "mismatch", lambda x: f"{x:.0e}"),
    ("tokens_per_s", "speed", lambda x: f"{x:6,.0f} tok/s"),
)
"""Metric, label and value with its unit, in the order of the console line; a metric the step lacks is left out."""


class RunDirectoryError(RuntimeError):
    """The run directory cannot be written: says which file, why, and what to do."""


class RunLog:
    """The log of one run. On every rank but the main one it only measures time.

    with RunLog(config.run_dir, num_steps=config.ppo.num_steps, is_main=rank == 0) as log:
        log.write_config(config)
        with log.span("generate"), log.progress("generate", total=num_rollouts) as advance:
            rollouts = fleet.generate(prompts, on_rollout=advance)
        log.record(step, metrics)
    """

    def __init__(self, run_dir: Path, *, num_steps: int, is_main: bool = True, console: Console | None = None) -> None:
        """num_steps: steps of the whole run, for display. Raises RunDirectoryError when run_dir cannot be written."""
        self.run_dir = run_dir
        self.console = console or Console(quiet=not is_main, highlight=False)
        self._num_steps = num_steps
        self._is_main = is_main
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._gauges: list[Callable[[], Metrics]] = []
        self._listeners: list[Callable[[str, float, float], None]] = []
        if is_main:
            with _writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                self._metrics = _LineFile(run_dir / METRICS_FILE)
                self._tensorboard = _EventFile(run_dir / "tensorboard")

    def write_config(self, config: Config) -> None:
        """Writes config.json, whole or not at all."""
        if not self._is_main:
            return
        path = self.run_dir / "config.json"
        unfinished = path.with_suffix(".json.tmp")
        try:
            with _writing(path):
                unfinished.write_text(to_json(config))
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `time/<name>_s` of the next record."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self._seconds[f"time/{name}_s"] += end - start
            for listener in self._listeners:
                listener(name, start, end)

    @contextmanager
    def progress(self, description: str, *, total: int) -> Iterator[Callable[[], None]]:
        """A bar that vanishes at the end; call what it yields for every finished item, from any thread.

        Draws nothing unless this is the main rank on an interactive terminal.
        """
        if not (self._is_main and self.console.is_terminal):
            yield lambda: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda: bar.advance(task)

    def include(self, gauge: Callable[[], Metrics]) -> None:
        """Adds what `gauge` says at the time to every later record."""
        self._gauges.append(gauge)

    def listen(self, on_span: Callable[[str, float, float], None]) -> None:
        """Calls `on_span(name, start, end)` after every later span, in seconds of `time.perf_counter`."""
        self._listeners.append(on_span)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a row of metrics, with the gauges and the spans since the last one, and prints its line."""
        row = {**metrics, **self._seconds}
        for gauge in self._gauges:
            row |= gauge()
        self._seconds.clear()
        if not self._is_main:
            return
        with _writing(self.run_dir):
            self._metrics.append(_to_json_line(step, row))
            self._tensorboard.append(step, row)
        # Soft wrapping leaves the line whole in a file, whatever width is assumed for it.
        self.console.print(console_line(step, self._num_steps, row), soft_wrap=True)

    def print_comparison(self, before: Metrics, after: Metrics) -> None:
        """Prints the evaluation metrics before and after training as a table."""
        self.console.print(comparison_table(before, after))

    def close(self) -> None:
        """Closes the files; what was recorded is already on disk."""
        if self._is_main:
            with _writing(self.run_dir):
                self._metrics.close()
                self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def set_aside(run_dir: Path) -> Path | None:
    """Renames a run directory that already holds a run to `<name>-1`, `-2`, ..., so that a new run begins empty.

    Returns where the old run went, or None where there was none.
    """
    if not (run_dir / METRICS_FILE).exists():
        return None
    target = next(path for n in count(1) if not (path := run_dir.with_name(f"{run_dir.name}-{n}")).exists())
    with _writing(target):
        return run_dir.rename(target)


def read_metrics(path: Path) -> list[Metrics]:
    """Rows of a metrics.jsonl, one for each step, in order; null reads as nan.

    Rows of one step are merged and the last value of a metric wins, so that a resumed run reads as one run.
    """
    text = path.read_text()
    rows: defaultdict[int, Metrics] = defaultdict(dict)
    for line in text[: text.rfind("\n") + 1].splitlines():
        row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        rows[int(row["step"])].update(row)
    return [rows[step] for step in sorted(rows)]


def console_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> Text:
    """One step in one line: the columns above, then held-out scores, then the seconds of all spans."""
    cells = [(label, show(metrics[name])) for name, label, show in CONSOLE_COLUMNS if name in metrics]
    cells += [
        (name.removeprefix("evaluation/"), _show_score(name, value))
        for name, value in metrics.items()
        if name.startswith("evaluation/")
    ]
    if seconds := [value for name, value in metrics.items() if name.startswith("time/")]:
        cells.append(("time", f"{sum(seconds):.1f} s"))
    width = len(str(num_steps))
    line = Text(f"step {step:{width}}/{num_steps}", style="bold")
    for label, value in cells:
        line.append(f"  {label} ", style="not bold dim").append(value, style="not bold")
    return line


def comparison_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Evaluation metrics before and after training, and their difference; `-` where one was not measured."""
    table = Table("held-out", box=box.SIMPLE_HEAD, title="before and after training")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys([*before, *after]):
        if not name.startswith("evaluation/"):
            continue
        values = before.get(name, math.nan), after.get(name, math.nan)
        cells = [_show_score(name, value) for value in values]
        table.add_row(name.removeprefix("evaluation/"), *cells, _show_score(name, values[1] - values[0], sign="+"))
    return table


def _show_score(name: str, value: float, sign: str = "") -> str:
    """A share (`avg@4`, `..._share`) in percent, a change of it in percentage points, anything else as it is."""
    if math.isnan(value):
        return "-"
    if "@" in name or name.endswith("_share"):
        return f"{100 * value:{sign}.1f} {'pp' if sign else '%'}"
    return f"{value:{sign}.4g}"


def _to_json_line(step: int, metrics: Mapping[str, float]) -> bytes:
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return (json.dumps({"step": step, **values}) + "\n").encode()


class _LineFile:
    """A file that only ever holds whole lines, and holds each as soon as it is appended."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        written = path.read_bytes()
        # A machine that went down while writing leaves half a line.
        self._file.truncate(written.rfind(b"\n") + 1)

    def append(self, line: bytes) -> None:
        """Appends a line, newline included; when it does not fit, raises OSError and leaves the file as it was."""
        _append(self._file, line)

    def close(self) -> None:
        self._file.close()


class _EventFile:
    """A TensorBoard event file that holds every row as soon as it is appended.

    TensorBoard's own writer works in a thread, where a full disk is a traceback that nothing can catch.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        now = time.time()
        self._file = (directory / f"events.out.tfevents.{now:.6f}.{os.getpid()}").open("ab", buffering=0)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one value of every metric; when they do not fit, raises OSError and leaves the file as it was."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        _append(self._file, record.getvalue())

    def close(self) -> None:
        self._file.close()


def _append(file: io.FileIO, data: bytes) -> None:
    """All of the data, or none of it and OSError."""
    size = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(size)
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write {error.filename or path}: {error.strerror or error}; "
            "free some space or set run_dir to a directory that can be written"
        ) from error
