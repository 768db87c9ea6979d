"""Runs that find too little room: one sentence, and nothing half written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_orz.rollout.servers import free_port
from tests.disks import small_disk
from tests.recipe import DEADLINE_S, Finished, command_line, run_process, sentence, without_times

pytestmark = pytest.mark.usefixtures("own_place")


@pytest.mark.parametrize("kib", [4, 8, 200])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kib: int
) -> None:
    """The disk fills with the config, with the first metrics, or with the final checkpoint."""
    with small_disk(tmp_path / "disk", "-o", f"size={kib}k") as disk:
        assert command_line(home, "--run-dir", str(disk / "run"), "--checkpoint.interval", "0") == 2
        said = capfd.readouterr().err
        remedy = "change run_dir" if kib == 200 else "set run_dir to a directory that can be written"
        expected = rf"cannot write .*{disk}/run.*: .*No space left on device.*; free some space or {remedy}"
        assert re.fullmatch(expected, sentence(said.splitlines()[-1]))
        assert "Traceback" not in said
        assert not list(disk.rglob("*final*"))
        assert not list(disk.rglob("*.unfinished"))
        assert (disk / "run" / "metrics.jsonl").read_bytes()[-1:] in (b"", b"\n")


def test_a_disk_too_small_for_a_second_checkpoint_keeps_the_first(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "-o", "size=7000k") as disk:
        at_every_step = ("--run-dir", str(disk / "run"), "--checkpoint.interval", "1", "--ppo.num-steps", "3")
        at_every_step += ("--generations.interval", "0", "--checkpoint.no-asynchronous")
        for _ in range(2):
            assert command_line(home, *at_every_step) == 2
            expected = (
                r"cannot write the checkpoint of step 2 \(.*No space left on device.*it goes on from step-00000001"
            )
            assert re.fullmatch(expected, sentence(capfd.readouterr().err.splitlines()[-1]))
        assert command_line(home, *at_every_step, "--checkpoint.interval", "0") == 0
        assert command_line(home, "--ppo.num-steps", "3", "--generations.interval", "0") == 0
        assert json.dumps(without_times(disk / "run")) == json.dumps(without_times(tmp_path / "run"))


def test_a_disk_too_small_for_the_curves_keeps_the_checkpoint(
    home: Path, tmp_path: Path, finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = finished.run_dir / "checkpoints"
    files = [file for file in finished.run_dir.rglob("*") if file.is_file() and checkpoints not in file.parents]
    pages = sum(-(-file.stat().st_size // 4096) for file in files)
    picture = (finished.run_dir / "curves.png").stat().st_size // 1024
    with small_disk(tmp_path / "disk", "-o", f"size={4 * pages - picture // 2}k") as disk:
        assert command_line(home, "--run-dir", str(disk / "run"), "--checkpoint.interval", "0") == 2
        said = capfd.readouterr().err
        expected = r"cannot write \S+curves\.png: No space left on device; free some space and run tools/plot\.py \S+"
        assert re.fullmatch(expected, sentence(said.splitlines()[-1]))
        assert "Traceback" not in said
        assert (disk / "run" / "final" / "model.safetensors").exists()
        assert not (disk / "run" / "curves.png").exists()


def test_two_ranks_end_together_when_one_cannot_write(home: Path, tmp_path: Path) -> None:
    """Rank 0 runs out of disk in the midst of the weights, which both ranks have to gather."""
    with small_disk(tmp_path / "disk", "-o", "size=200k") as disk:
        grid = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = ("--run-dir", str(disk / "run"), "--parallel.tp", "2", "--ppo.num-steps", "1")
        arguments += ("--checkpoint.interval", "0")
        ranks = [run_process(home, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **grid) for rank in range(2)]
        try:
            said = [rank.communicate(timeout=DEADLINE_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [2, 2], said
        last = said[0].splitlines()[-1]
        assert re.match(r"error on rank 0: cannot write the checkpoint \S+final: .*; free some space", last)
        assert "error" not in said[1]
        assert "Traceback" not in said[0] + said[1]
        assert not list(disk.rglob("*final*"))
