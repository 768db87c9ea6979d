"""Runs in processes: how their ends are told, and that nothing outlives the wait for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_orz.ablation import runs
from megatron_orz.ablation.plan import Run, make_plan
from megatron_orz.ablation.runs import command, log_path, make
from megatron_orz.recipe_file import read_recipe

IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SLEEP = "import time; print('begun', flush=True); time.sleep(600)"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    plan = make_plan(
        read_recipe(Path("examples/demo.py")), sets=["kl"], seeds=[0], output=tmp_path / "output", options=[]
    )
    run = plan.of("kl-loss")[0]
    checkpoint = replace(run.config.checkpoint, grace_s=0.5)
    return replace(run, config=replace(run.config, checkpoint=checkpoint))


def children() -> set[psutil.Process]:
    """Processes under this one that live."""
    return {child for child in psutil.Process().children(recursive=True) if lives(child)}


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """The test leaves no process behind; a worker of earlier tests may live on."""
    before = children()
    yield
    assert children() - before == set()


def made(
    run: Run, program: str, *, timeout_s: float = 300.0, on_steps: Callable[[int], None] = lambda num_steps: None
) -> str | None:
    return make(run, [sys.executable, "-c", program], timeout_s=timeout_s, on_steps=on_steps)


def test_a_run_that_ends_well_leaves_its_output_beside_its_directory(run: Run) -> None:
    assert made(run, "print('first')") is None
    assert made(run, "print('second')") is None
    assert log_path(run).read_text() == "first\nsecond\n"
    assert log_path(run).name == "kl-loss-seed0.log"


def test_a_failure_is_told_with_the_last_line_of_this_attempt(run: Run) -> None:
    assert (
        made(run, "print('error: of old'); raise SystemExit(1)") == f"exit code 1: error: of old; see {log_path(run)}"
    )
    reason = made(run, "import sys; print('error: no space\\n\\n', file=sys.stderr); sys.exit(2)")
    assert reason == f"exit code 2: error: no space; see {log_path(run)}"
    assert made(run, "raise SystemExit(3)") == f"exit code 3: it printed nothing; see {log_path(run)}"


def test_steps_are_counted_while_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    program = (
        f"import pathlib, time; p = pathlib.Path({str(run.metrics_path)!r}); p.parent.mkdir(parents=True);"
        f"p.write_text('{{}}\\n{{}}\\n{{'); seen = pathlib.Path({str(seen)!r})\n"
        "while not seen.exists(): time.sleep(0.05)"
    )
    assert made(run, program, on_steps=lambda num_steps: seen.touch() if num_steps == 2 else None) is None


@pytest.mark.parametrize("prefix", ["", IGNORE], ids=["obeys", "ignores SIGTERM"])
@pytest.mark.usefixtures("nothing_stays")
def test_a_run_past_its_time_is_ended(run: Run, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "KILL_S", 2.0)
    start = time.monotonic()
    reason = made(run, prefix + SLEEP, timeout_s=3.0)
    assert reason is not None
    assert reason.startswith("stopped after 3 s; raise --run-timeout-s")
    assert time.monotonic() - start < 300


@pytest.mark.usefixtures("nothing_stays")
def test_an_interrupt_ends_the_run_first(run: Run) -> None:
    def interrupt(num_steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(run, [sys.executable, "-c", SLEEP], timeout_s=60, on_steps=interrupt)


def test_several_ranks_are_started_by_torchrun(run: Run) -> None:
    alone, ranks = (command(Path("recipe.py"), run, num_ranks=num_ranks) for num_ranks in (1, 4))
    assert alone == [sys.executable, "recipe.py", *run.options]
    assert ranks == [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "recipe.py", *run.options]


@pytest.mark.slow
def test_a_signal_to_the_tool_ends_the_run_too(home: Path, tmp_path: Path) -> None:
    """The tool gets SIGTERM while a run is being started."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    arguments = ["--recipe", str(home / "recipe.py"), "--sets", "kl", "--seeds", "0", "--output", str(tmp_path)]
    tool = subprocess.Popen(
        [sys.executable, "tools/ablate.py", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (runs_begun := psutil.Process(tool.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    (run,) = runs_begun
    tool.send_signal(signal.SIGTERM)
    _, errors = tool.communicate(timeout=120)
    assert tool.returncode == 130, errors
    assert not run.is_running()
