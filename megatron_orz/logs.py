"""What a run tells and leaves behind in its directory.

    metrics.jsonl    a row per step: `step` and the metrics, appended whole; null is what is not a finite number
    tensorboard/     the same and histograms, for TensorBoard
    config.json      the resolved config

Metrics are named `group/name`. They arrive already averaged over ranks; only the main rank writes and speaks.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_orz import terminal
from megatron_orz.alerts import Alerts
from megatron_orz.closeable import Closeable
from megatron_orz.config import RunConfig, to_json
from megatron_orz.json_file import parse_json
from megatron_orz.log_files import EventFile, LineFile
from megatron_orz.trackers import Trackers
from megatron_orz.types import Metrics
from megatron_orz.whole_file import whole_file

METRICS_FILE = "metrics.jsonl"

CONSOLE_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("supervised/loss", "loss", lambda x: f"{x:.4f} nat"),
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


@dataclass(frozen=True)
class LogPosition:
    """A place between two rows of the log."""

    step: int
    """Of the row that comes next."""
    num_bytes: int
    """Length of metrics.jsonl up to there."""


class RunLog(Closeable):
    """The log of one run. On every rank but the main one it only measures time.

    with RunLog(config.run_dir, num_steps=config.ppo.num_steps, is_main=rank == 0) as log:
        log.write_config(config)
        with log.span("generate"), log.progress("generate", total=num_rollouts) as advance:
            rollouts = fleet.generate(prompts, on_rollout=advance)
        log.record(step, metrics)
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_steps: int,
        is_main: bool = True,
        console: Console | None = None,
        goes_on_at: LogPosition | None = None,
        on_progress: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Raises RunDirectoryError when run_dir cannot be written.

        num_steps: steps of the whole run, for display.
        goes_on_at: where the run goes on from; rows that an interrupted run wrote after that are dropped.
        on_progress: called with the name of a span or bar when it begins, when it ends, and for its finished items.
        """
        self.run_dir = run_dir
        self.console = console or Console(quiet=not is_main, highlight=False)
        self._num_steps = num_steps
        self._is_main = is_main
        self._on_progress = on_progress
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._gauges: list[Callable[[], Metrics]] = []
        self._distributions: dict[str, Sequence[float]] = {}
        self._trackers: Trackers | None = None
        self._listeners: list[Callable[[str, float, float], None]] = []
        if is_main:
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                self._metrics = LineFile(run_dir / METRICS_FILE, goes_on_at.num_bytes if goes_on_at else None)
                if goes_on_at and (found := self._metrics.flush()) < goes_on_at.num_bytes:
                    self.console.print(
                        f"warning: {METRICS_FILE} lacks rows before step {goes_on_at.step}: {found} of "
                        f"{goes_on_at.num_bytes} bytes are there",
                        soft_wrap=True,
                    )
                self._alerts = Alerts(read_metrics(run_dir / METRICS_FILE))
                self._tensorboard = EventFile(run_dir / "tensorboard", goes_on_at.step if goes_on_at else None)

    def write_config(self, config: RunConfig) -> None:
        """Writes config.json, whole or not at all."""
        if not self._is_main:
            return
        path = self.run_dir / "config.json"
        with writing(path), whole_file(path) as file:
            file.write(to_json(config).encode())

    def start_trackers(self, config: RunConfig) -> None:
        """Hands every later record to the trackers that the config names, too.

        Raises RuntimeError when one does not start.
        """
        if self._is_main:
            self._trackers = Trackers(config)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `time/<name>_s` of the next record."""
        self._on_progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._on_progress(name)
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
            yield lambda: self._on_progress(description)
            return
        with terminal.progress(self.console) as bar:
            task = bar.add_task(description, total=total)

            def advance() -> None:
                self._on_progress(description)
                bar.advance(task)

            yield advance

    def include(self, gauge: Callable[[], Metrics]) -> None:
        """Adds what `gauge` says at the time to every later record."""
        self._gauges.append(gauge)

    def listen(self, on_span: Callable[[str, float, float], None]) -> None:
        """Calls `on_span(name, start, end)` after every later span, in seconds of `time.perf_counter`."""
        self._listeners.append(on_span)

    def distribution(self, name: str, values: Sequence[float]) -> None:
        """Shows the values as a histogram with the next record; none are not shown."""
        if values:
            self._distributions[name] = values

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a row of metrics, with the gauges and the spans since the last one, and prints its line.

        What looks wrong among them is said below the line, and is `alert/<metric>` = 1 in the row.
        """
        row, distributions = {**metrics, **self._seconds}, self._distributions
        for gauge in self._gauges:
            row |= gauge()
        self._seconds.clear()
        self._distributions = {}
        if not self._is_main:
            return
        alerts = self._alerts.watch(row)
        row |= {f"alert/{alert.metric}": 1.0 for alert in alerts}
        with writing(self.run_dir):
            self._metrics.append(_to_json_line(step, row))
            self._tensorboard.append(step, row, distributions)
        if self._trackers is not None:
            self._trackers.record(step, row)
        # Soft wrapping leaves the line whole in a file, whatever width is assumed for it.
        self.console.print(console_line(step, self._num_steps, row), soft_wrap=True)
        for alert in alerts:
            self.console.print(f"alert at step {step}: {alert.message}", style="bold red", soft_wrap=True)

    def flush(self) -> int:
        """Brings all rows to the disk. Returns the length of metrics.jsonl in bytes; 0 on the other ranks."""
        if not self._is_main:
            return 0
        with writing(self.run_dir):
            self._tensorboard.flush()
            return self._metrics.flush()

    def print_comparison(self, before: Metrics, after: Metrics) -> None:
        """Prints the evaluation metrics before and after training as a table."""
        self.console.print(comparison_table(before, after))

    def close(self) -> None:
        """Closes the files, which already hold what was recorded, and waits for the trackers."""
        if self._trackers is not None:
            self._trackers.close()
        if self._is_main:
            with writing(self.run_dir):
                self._metrics.close()
                self._tensorboard.close()


def set_aside(run_dir: Path) -> Path | None:
    """Renames a run directory that already holds a run to `<name>-1`, `-2`, ..., so that a new run begins empty.

    Returns where the old run went, or None where there was none.
    """
    if not (run_dir / METRICS_FILE).exists():
        return None
    target = next(path for n in count(1) if not (path := run_dir.with_name(f"{run_dir.name}-{n}")).exists())
    with writing(target):
        return run_dir.rename(target)


def read_metrics(path: Path) -> list[Metrics]:
    """Rows of a metrics.jsonl, one for each step, in order; null reads as nan.

    Rows of one step are merged and the last value of a metric wins, so that a resumed run reads as one run.
    Raises ValueError naming the file and the line that is no row.
    """
    content = path.read_bytes()
    rows: defaultdict[int, Metrics] = defaultdict(dict)
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        place = f"{path}: line {number}"
        row = parse_json(line, place)
        if not _is_row(row):
            raise ValueError(f"{place} is not a row of metrics; remove it")
        rows[row["step"]].update({name: math.nan if value is None else value for name, value in row.items()})
    return [rows[step] for step in sorted(rows)]


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(value is None or type(value) in (int, float) for value in row.values())
    )


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
    table = terminal.table("before and after training", ["held-out"], ["before", "after", "change"])
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk in the body becomes a RunDirectoryError."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write {error.filename or path}: {error.strerror or error}; "
            "free some space or set run_dir to a directory that can be written"
        ) from error
