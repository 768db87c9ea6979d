"""When the trainer and its servers did what: a trace that Chrome (chrome://tracing) and Perfetto open, and a picture.

timeline.json    one event per span, appended as it ends; the trace format allows the list to stay open
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from megatron_orz.closeable import Closeable
from megatron_orz.log_files import LineFile

TIMELINE_FILE = "timeline.json"
TRACKS = ("trainer", "servers")


class Timeline(Closeable):
    """Writes spans of two tracks; a context manager."""

    def __init__(self, path: Path) -> None:
        """Goes on with a timeline that is there. Raises RuntimeError, here and later, for what cannot be written."""
        self._path = path
        with self._explained():
            self._file = LineFile(path)
            if path.stat().st_size == 0:
                self._begin()

    def on_trainer(self, name: str, start_s: float, end_s: float) -> None:
        """A span of the trainer's main thread, in seconds of `time.perf_counter`."""
        self._span(0, name, start_s, end_s)

    def on_servers(self, name: str, start_s: float, end_s: float) -> None:
        """A span in which servers generated beside the trainer."""
        self._span(1, name, start_s, end_s)

    def close(self) -> None:
        """Closes the file; what was added is already on disk."""
        self._file.close()

    def _begin(self) -> None:
        self._file.append(b"[\n")
        for number, track in enumerate(TRACKS):
            self._write({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}})

    def _span(self, track: int, name: str, start_s: float, end_s: float) -> None:
        microseconds = {"ts": round(1e6 * start_s), "dur": round(1e6 * (end_s - start_s))}
        self._write({"ph": "X", "name": name, "pid": 0, "tid": track, **microseconds})

    def _write(self, event: dict[str, object]) -> None:
        with self._explained():
            self._file.append(json.dumps(event).encode() + b",\n")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RuntimeError(
                f"cannot write {self._path}: {error.strerror or error}; free some space or change run_dir"
            ) from error


def read_spans(path: Path) -> list[tuple[str, str, float, float]]:
    """Track, name, start and duration in seconds of every span, from the first one's start. Raises ValueError."""
    content = path.read_bytes()
    whole_lines = content[: content.rfind(b"\n") + 1]  # a machine that went down may have left half a line
    try:
        events = json.loads(whole_lines.rstrip().rstrip(b",") + b"]")
    except ValueError as error:
        raise ValueError(f"{path} is no timeline ({error}); give that of a run with ppo.max_staleness 1") from error
    spans = [event for event in events if event["ph"] == "X"]
    first = min((event["ts"] for event in spans), default=0)
    return [(TRACKS[event["tid"]], event["name"], (event["ts"] - first) / 1e6, event["dur"] / 1e6) for event in spans]


def draw_timeline(path: Path, picture: Path) -> None:
    """Both tracks as bars over time, a colour for each kind of span."""
    spans = read_spans(path)
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for _, name, _, _ in spans))
    for index, name in enumerate(names):
        for row, track in enumerate(reversed(TRACKS)):
            bars = [(start, duration) for where, what, start, duration in spans if (where, what) == (track, name)]
            if bars:
                axes.broken_barh(bars, (row - 0.4, 0.8), color=f"C{index}", label=name)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.25))
    axes.set_yticks(range(len(TRACKS)), list(reversed(TRACKS)))
    axes.set_xlabel("seconds")
    figure.savefig(picture, dpi=150)
