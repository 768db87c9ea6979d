"""Runs one command and sees to it that nothing of it outlives the process that asked for it.

    python -I -S supervisor.py PARENT_PID GRACE_S COMMAND...

It ends the command and all its descendants when PARENT_PID dies (even by SIGKILL), when it receives SIGTERM or
SIGINT, or when the command itself ends. Linux only; the standard library only, so that it starts in milliseconds.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1


def main(parent_pid: int, grace_s: float, command: list[str]) -> int:
    """Returns the exit code of the command, 128 + n for signal n as shells do."""
    libc = ctypes.CDLL(None)
    # Orphans below this process become its children, so a descendant can hide neither in a new session nor in a
    # process group of its own.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)

    stop_requests: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop_requests.append(received))
    # A scheduler that warns the trainer may warn every process; the command inherits this.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    server = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    # A dead parent is seen by the change of the parent's id. A pipe would not do: every process the trainer forks
    # would hold its writing end open.
    while server.poll() is None and not stop_requests and os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    exit_code = server.returncode
    end_descendants(grace_s)
    if exit_code is None:
        return 0
    return exit_code if exit_code >= 0 else 128 - exit_code


def end_descendants(grace_s: float) -> None:
    """SIGTERM to all, SIGKILL to whatever is left after `grace_s` seconds; returns when none is left."""
    deadline = time.monotonic() + grace_s
    signal_descendants(signal.SIGTERM)
    while has_children():
        if time.monotonic() >= deadline:
            signal_descendants(signal.SIGKILL)
        time.sleep(_POLL_S / 2)


def has_children() -> bool:
    """Reaps the dead children; False when there is no other."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return False
    return True


def signal_descendants(number: int) -> None:
    """Sends a signal to every process below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_bytes()
            except OSError:  # the process has ended since the listing
                continue
            # "pid (command) state ppid ...", where the command may hold any bytes, parentheses included.
            parent = int(stat.rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))

    pending = children.get(os.getpid(), [])
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
