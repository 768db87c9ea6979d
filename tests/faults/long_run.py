"""What a long run takes of the machine, step by step: nothing of it may grow.

python -m tests.faults.long_run --steps 500                 # about two minutes
python -m tests.faults.long_run --steps 500 --fleet vllm    # with a server: ten minutes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median

import psutil

from tests.faults.tiny_run import write_recipe

SAMPLE_EVERY_S = 0.5
DEADLINE_S = 3600
LOGS = ("metrics.jsonl", "tensorboard", "generations", "vllm.log")
"""What is there to grow."""


@dataclass(frozen=True)
class Sample:
    """What the trainer and all its processes hold after so many steps."""

    step: int
    memory_mib: float
    """Private to the processes, shared pages left out."""
    files: int
    """Open descriptors."""
    threads: int
    processes: int
    shm_mib: float
    """Of /dev/shm, mapped by the processes."""
    disk_mib: float
    """In the run directory, logs left out."""
    logs_mib: float


def run_and_sample(num_steps: int, fleet: str = "local") -> list[Sample]:
    """Runs the tiny recipe in a process of its own, with a checkpoint every ten steps."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        recipe = write_recipe(place, family="qwen3" if fleet == "vllm" else "qwen2")
        arguments = ["--ppo.num-steps", str(num_steps), "--fleet.kind", fleet, "--checkpoint.interval", "10"]
        with (place / "said").open("w") as said:
            run = subprocess.Popen(
                [sys.executable, str(recipe), *arguments],
                cwd=place,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            try:
                samples = list(_samples(run, place / "run"))
            finally:
                run.kill()
                run.wait()
        if run.returncode:
            raise RuntimeError((place / "said").read_text())
    return samples


def _samples(run: subprocess.Popen[bytes], run_dir: Path) -> Iterator[Sample]:
    deadline = time.monotonic() + DEADLINE_S
    while run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(SAMPLE_EVERY_S)
        # A process or a file may go while it is looked at.
        with contextlib.suppress(psutil.Error, OSError, json.JSONDecodeError, IndexError):
            yield _sample(psutil.Process(run.pid), run_dir)


def _sample(trainer: psutil.Process, run_dir: Path) -> Sample:
    with (run_dir / "metrics.jsonl").open("rb") as rows:
        step = json.loads(rows.readlines()[-1])["step"]
    tree = [trainer, *trainer.children(recursive=True)]
    logs = sum(_bytes(run_dir / name) for name in LOGS)
    return Sample(
        step=step,
        memory_mib=sum(process.memory_full_info().uss for process in tree) / 2**20,
        files=sum(process.num_fds() for process in tree),
        threads=sum(process.num_threads() for process in tree),
        processes=len(tree),
        shm_mib=sum(_shared_bytes(process) for process in tree) / 2**20,
        disk_mib=(_bytes(run_dir) - logs) / 2**20,
        logs_mib=logs / 2**20,
    )


def _shared_bytes(process: psutil.Process) -> int:
    return sum(mapped.rss for mapped in process.memory_maps() if mapped.path.startswith("/dev/shm"))


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def growth(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """Medians after the first quarter of the steps, and over the last quarter: (second, fourth)."""
    last = samples[-1].step
    parts = [
        [getattr(sample, name) for sample in samples if first * last <= sample.step < end * last]
        for first, end in ((0.25, 0.5), (0.75, 1.0))
    ]
    return median(parts[0]), median(parts[1])


def main() -> None:
    """Prints a table of samples and the growth of every column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--fleet", choices=("local", "vllm"), default="local")
    options = parser.parse_args()
    if options.steps < 50:
        parser.error(f"--steps {options.steps} is too few to compare its quarters; give at least 50")
    samples = run_and_sample(options.steps, options.fleet)
    names = [field.name for field in fields(Sample)]
    print("  ".join(f"{name:>10}" for name in names))
    for sample in samples[:: max(1, len(samples) // 12)]:
        print("  ".join(f"{value:10.1f}" if isinstance(value, float) else f"{value:10d}" for value in astuple(sample)))
    for name in names[1:]:
        second, fourth = growth(samples, name)
        print(f"{name:>10}: {second:.1f} in the second quarter of the steps, {fourth:.1f} in the last")


if __name__ == "__main__":
    main()
