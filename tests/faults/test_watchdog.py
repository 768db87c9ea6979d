"""A rank that dies or hangs: how long the others go on, how the run ends, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_orz import peers as peers_module
from megatron_orz.command_line import HUNG, RANK_LOST, USER_ERROR
from megatron_orz.peers import Peers
from megatron_orz.rollout.servers import free_port
from megatron_orz.watchdog import STACKS
from tests.faults import ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(directory: Path) -> dict[str, Any]:
    """How the ranks of every fault ended."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.faults.ranks", str(directory), *ranks.FAULTS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=2 * ranks.DEADLINE_S, check=True
    )
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize(
    ("fault", "exit_codes", "said", "by"),
    [
        ("raises", (1, 1), "KeyError: 'the first cause'", 1),
        ("raises_while_the_other_works", (USER_ERROR, USER_ERROR), "error on rank 1: the first cause", 1),
        ("refuses_its_input", (USER_ERROR, USER_ERROR), "error on rank 0: the first cause", 0),
        ("one_refuses_its_input", (USER_ERROR, USER_ERROR), "error: ValueError: the first cause", 0),
        ("is_killed", (RANK_LOST, -9), "was killed or crashed: it ended without an error message", 0),
        ("is_killed_while_the_other_works", (RANK_LOST, -9), "was killed or crashed", 0),
        ("rank_0_is_killed_with_the_store", (-9, RANK_LOST), "error: rank 0", 1),
    ],
)
def test_a_rank_that_ends_takes_the_other_down_and_the_cause_is_said_once(
    ended: dict[str, Any], fault: str, exit_codes: tuple[int, int], said: str, by: int
) -> None:
    pair = ended[fault]
    assert tuple(rank["exit_code"] for rank in pair) == exit_codes
    assert pair[by]["stderr"].count(said) == 1
    assert pair[1 - by]["stderr"] == ""
    if said[0] != "K":  # a defect shows its traceback; everything else is a line
        assert len(pair[by]["stderr"].splitlines()) == 1
    assert max(rank["seconds"] for rank in pair) < ranks.PATIENT_S


def test_ranks_that_wait_for_ever_leave_their_stacks_and_end(ended: dict[str, Any], directory: Path) -> None:
    pair = ended["waits_for_a_lock"]
    assert [rank["exit_code"] for rank in pair] == [HUNG, HUNG]
    said = "".join(rank["stderr"] for rank in pair)
    assert said.count("error: nothing has moved for hang_timeout_s = 10 s") == 1
    assert len(said.splitlines()) == 1
    stacks = directory / "waits_for_a_lock" / STACKS
    assert "in wait_for_each_other" in (stacks / "rank-00000.txt").read_text()
    assert "in waits_for_a_lock" in (stacks / "rank-00001.txt").read_text()
    assert max(rank["seconds"] for rank in pair) < ranks.HANG_TIMEOUT_S + ranks.GRACE_S + ranks.PATIENT_S


def test_a_single_rank_is_watched_too(ended: dict[str, Any], directory: Path) -> None:
    [rank] = ended["waits_alone"]
    assert rank["exit_code"] == HUNG
    assert len(rank["stderr"].splitlines()) == 1
    assert "in waits_alone" in (directory / "waits_alone" / STACKS / "rank-00000.txt").read_text()


def test_a_call_that_keeps_the_interpreter_to_itself_is_ended(ended: dict[str, Any]) -> None:
    [rank] = ended["keeps_the_interpreter"]
    assert rank["exit_code"] == 1
    assert "in keeps_the_interpreter" in rank["stderr"]
    assert rank["seconds"] < ranks.HANG_TIMEOUT_S + 3 * ranks.GRACE_S + ranks.PATIENT_S


def test_a_stopped_process_is_a_hang(ended: dict[str, Any], directory: Path) -> None:
    [healthy, stopped] = ended["is_stopped"]
    assert healthy["exit_code"] == HUNG
    assert stopped["exit_code"] is None  # only SIGKILL ends it, which torchrun sends after half a minute
    assert "in wait_for_each_other" in (directory / "is_stopped" / STACKS / "rank-00000.txt").read_text()
    assert healthy["seconds"] < ranks.HANG_TIMEOUT_S + ranks.GRACE_S + ranks.PATIENT_S


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [("ends_early", 0), ("is_suspended_for_long", 0), ("exits_in_order", ranks.ORDERLY_EXIT_CODE)],
)
def test_what_is_no_failure_ends_nothing(ended: dict[str, Any], directory: Path, fault: str, exit_code: int) -> None:
    assert [(rank["exit_code"], rank["stderr"]) for rank in ended[fault]] == 2 * [(exit_code, "")]
    assert not (directory / fault / STACKS).exists()


def test_a_store_that_goes_with_rank_0_is_told_as_its_loss() -> None:
    """Rank 0 dies between the look at its process and the one at the store."""
    first = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    class Gone(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            first.kill()
            first.wait()
            raise dist.DistError("connection reset by peer")

    peers = Peers(Gone(), rank=1, size=2)
    started = psutil.Process(first.pid).create_time()
    peers._watched[0] = replace(peers_module._Process.current(), pid=first.pid, started=started)
    failure = peers.failure()
    assert failure is not None
    assert (failure.rank, failure.exit_code) == (1, RANK_LOST)
    assert failure.message.startswith(f"rank 0 (process {first.pid}) was killed or crashed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "first_cause"),
    [
        ("raises", "KeyError: 'the first cause'"),
        ("is_killed_while_the_other_works", "Signal 9 (SIGKILL) received by PID"),
        ("is_stopped", "error: nothing has moved for hang_timeout_s = 10 s"),
    ],
)
def test_torchrun_ends_a_run_that_has_lost_a_rank(tmp_path: Path, fault: str, first_cause: str) -> None:
    (tmp_path / "fault").touch()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, "-m", "tests.faults.ranks", str(tmp_path), fault],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    seconds = time.time() - (tmp_path / "fault").stat().st_mtime
    print(f"{fault}: torchrun has ended {seconds:.1f} s after the fault, with {len(done.stderr.splitlines())} lines")
    assert done.returncode != 0
    assert first_cause in done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(ours) == (fault == "is_stopped")
    # A stopped process ends with torchrun's SIGKILL only, half a minute after its SIGTERM.
    assert seconds < (80 if fault == "is_stopped" else 30)
