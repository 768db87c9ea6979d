"""The supervisor ends everything below it. The stand-in for a server starts a child that is as hard to end as can be:
it ignores SIGTERM, is in a session of its own, and has a name that is no text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_orz.rollout import process
from megatron_orz.rollout.process import SupervisedProcess

STUBBORN_CHILD = r"""
import ctypes, signal, time
set_name = 15
ctypes.CDLL(None).prctl(set_name, b"\xff) (\xff")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
SERVER = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {STUBBORN_CHILD!r}], start_new_session=True)
print("pid", child.pid, flush=True)
time.sleep(600)
"""
TRAINER = f"""
import os, sys, time
from pathlib import Path
from megatron_orz.rollout import process
process._GRACE_S = 0.5
command = [sys.executable, "-c", {SERVER!r}]
server = process.SupervisedProcess(command, environment=os.environ, log_path=Path(sys.argv[1]))
print(server.pid, flush=True)
time.sleep(600)
"""


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def tree(supervisor_pid: int, log_path: Path) -> list[psutil.Process]:
    """The supervisor, the server and its child, once all of them run."""
    wait_for(lambda: log_path.exists() and "ready" in log_path.read_text())
    supervisor = psutil.Process(supervisor_pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    assert len(processes) == 3
    return processes


def are_gone(processes: list[psutil.Process]) -> bool:
    return all(map(is_gone, processes))


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended since the first look
        return True


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "server.log"


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_S", 0.5)
    monkeypatch.setattr(process, "_END_S", 120.0)


def start(program: str, log_path: Path) -> SupervisedProcess:
    return SupervisedProcess([sys.executable, "-c", program], environment=os.environ, log_path=log_path)


def test_close_ends_the_whole_tree(log_path: Path) -> None:
    with start(SERVER, log_path) as server:
        processes = tree(server.pid, log_path)
    assert are_gone(processes)


def test_an_exception_in_the_trainer_ends_the_whole_tree(log_path: Path) -> None:
    processes = []

    def train() -> None:
        with start(SERVER, log_path) as server:
            processes.extend(tree(server.pid, log_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert len(processes) == 3
    assert are_gone(processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_no_process(log_path: Path, number: signal.Signals) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(log_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert trainer.stdout is not None
    processes = tree(int(trainer.stdout.readline()), log_path)
    trainer.send_signal(number)
    trainer.communicate()
    wait_for(lambda: are_gone(processes))


def test_a_killed_server_takes_its_children_along(log_path: Path) -> None:
    with start(SERVER, log_path) as server:
        processes = tree(server.pid, log_path)
        processes[1].kill()
        assert server.exit_code(wait_s=120) == 128 + signal.SIGKILL
        assert are_gone(processes)


def test_a_killed_supervisor_takes_the_server_along(log_path: Path) -> None:
    with start(SERVER, log_path) as server:
        supervisor, command, child = tree(server.pid, log_path)
        supervisor.kill()
        wait_for(lambda: are_gone([command]))
        child.kill()  # a server's own children must see to themselves; vLLM's engine does


def test_the_exit_code_and_the_reason_of_an_early_end_are_known(log_path: Path) -> None:
    program = "import sys; print('loading'); raise OSError('no such weights')"
    with start(program, log_path) as server:
        assert server.exit_code(wait_s=120) == 1
        assert server.last_words().startswith("OSError: no such weights\n...\nloading\nTraceback")


def test_a_second_server_writes_below_the_first_and_is_judged_by_its_own_words(log_path: Path) -> None:
    for word in ("first", "second"):
        command = [sys.executable, "-c", f"raise OSError('the {word}')"]
        with SupervisedProcess(command, environment=os.environ, log_path=log_path) as server:
            assert server.exit_code(wait_s=120) == 1
            assert server.last_words().startswith(f"OSError: the {word}\n...\nTraceback")
    assert "OSError: the first" in log_path.read_text()


def test_a_log_that_is_gone_is_said_in_place_of_its_words(log_path: Path) -> None:
    with start("raise OSError('no such weights')", log_path) as server:
        assert server.exit_code(wait_s=120) == 1
        log_path.unlink()
        assert server.last_words().startswith("it cannot be read: [Errno 2]")


def test_a_running_server_has_no_exit_code(log_path: Path) -> None:
    with start(SERVER, log_path) as server:
        assert server.exit_code() is None
