"""Runs untrusted Python in a limited process of its own: `confinement.py` says what it can and cannot do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_orz.rewards.confinement import Limits

Isolation: TypeAlias = Literal["namespaces", "limits"]
"""`namespaces`: no network, no other process, no file of the machine; `limits`: resource limits alone."""

_CONFINEMENT = Path(__file__).with_name("confinement.py")
_MARGIN_S = 30.0
"""What starting and ending the confinement may take beside the program's own time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended."""

    exit_code: int
    """-n for signal n: -24 is out of processor time, -25 a file too large, -9 the deadline."""
    timed_out: bool
    """It ran past `wall_s`, or out of processor time."""
    stdout: bytes
    stderr: bytes
    isolation: Isolation


def run_python(program: str, *, stdin: bytes = b"", limits: Limits = Limits()) -> Outcome:  # noqa: B008
    """Runs a Python program to its end, or to the end of its limits; nothing of it is left behind.

    Raises RuntimeError when the sandbox itself fails, which a program cannot bring about.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-orz-sandbox-") as directory:
        root = Path(directory)
        scratch = root / "scratch"
        scratch.mkdir()
        # A lone surrogate has no UTF-8; Python finds the question mark in its place as a syntax error or a literal.
        (scratch / "main.py").write_bytes(program.encode("utf-8", errors="replace"))
        (root / "stdin").write_bytes(stdin)
        with (
            (root / "stdin").open("rb") as source,
            (root / "stdout").open("wb") as stdout,
            (root / "stderr").open("wb") as stderr,
        ):
            report = _run(scratch, source.fileno(), stdout.fileno(), stderr.fileno(), limits)
        if report["isolation"] == "limits":
            _warn_of_weak_isolation()
        return Outcome(stdout=(root / "stdout").read_bytes(), stderr=(root / "stderr").read_bytes(), **report)


def _run(scratch: Path, stdin: int, stdout: int, stderr: int, limits: Limits) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    arguments = [str(write_end), str(os.getpid()), str(scratch), json.dumps(limits)]
    with open(read_end, "rb") as report:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CONFINEMENT), *arguments],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[write_end],
                env={},
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            process.wait(limits.wall_s + _MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its children end with it
            process.wait()
        text = report.read()
    if not text:
        raise RuntimeError(
            f"the sandbox ended with code {process.returncode} and without a report; "
            "look for what ends processes on this machine, such as a lack of memory"
        )
    answer: dict[str, Any] = json.loads(text)
    return answer


@lru_cache(maxsize=1)
def _warn_of_weak_isolation() -> None:
    logger.warning(
        "this machine grants no namespaces: generated programs run with resource limits alone, and could use the "
        "network and the files of this user; run where `unshare --user --net true` works"
    )
