"""Files that hold what was appended as soon as it is appended, and nothing by halves."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

NUM_BINS = 30
"""Of a histogram."""


class LineFile:
    """A file that only ever holds whole lines, and holds each as soon as it is appended."""

    def __init__(self, path: Path, num_bytes: int | None = None) -> None:
        """num_bytes: what lies behind them is dropped."""
        self._file = path.open("ab", buffering=0)
        written = path.read_bytes()[:num_bytes]
        # A machine that went down while writing leaves half a line.
        self._file.truncate(written.rfind(b"\n") + 1)

    def append(self, line: bytes) -> None:
        """Appends a line, newline included; when it does not fit, raises OSError and leaves the file as it was."""
        _append(self._file, line)

    def flush(self) -> int:
        """Brings the lines to the disk, and returns their bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


class EventFile:
    """A TensorBoard event file that holds every row as soon as it is appended.

    TensorBoard's own writer works in a thread, where a full disk is a traceback that nothing can catch.
    """

    def __init__(self, directory: Path, first_step: int | None = None) -> None:
        """first_step: TensorBoard drops what earlier files hold of this step and later ones."""
        directory.mkdir(exist_ok=True)
        now = time.time()
        self._file = (directory / f"events.out.tfevents.{now:.6f}.{os.getpid()}").open("ab", buffering=0)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=now, step=first_step, session_log=start))

    def append(self, step: int, metrics: Mapping[str, float], distributions: Mapping[str, Sequence[float]]) -> None:
        """Appends one value of every metric, and the histograms of the distributions, none of which is empty.

        When they do not fit, raises OSError and leaves the file as it was.
        """
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        values += [Summary.Value(tag=name, histo=_histogram(numbers)) for name, numbers in distributions.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Brings the rows to the disk."""
        os.fsync(self._file.fileno())

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        _append(self._file, record.getvalue())

    def close(self) -> None:
        self._file.close()


def _histogram(values: Sequence[float]) -> HistogramProto:
    counts, edges = np.histogram(values, bins=NUM_BINS)
    return HistogramProto(
        min=min(values),
        max=max(values),
        num=len(values),
        sum=sum(values),
        sum_squares=sum(value * value for value in values),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _append(file: io.FileIO, data: bytes) -> None:
    """All of the data, or none of it and OSError."""
    size = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(size)
        raise
