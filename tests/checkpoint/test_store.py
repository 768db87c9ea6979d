"""Checkpoints on disk: whole or not at all, thinned out, and never trusted without their digests."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_orz.checkpoint.manifest import DamagedCheckpointError, Manifest, Progress
from megatron_orz.checkpoint.store import CheckpointStore, CheckpointWriteError
from megatron_orz.config import CheckpointConfig
from megatron_orz.ranks import Ranks
from tests.disks import small_disk
from tests.launch import run_ranks


@dataclass
class Part:
    """Some bytes as a part of a checkpoint, in two files; `gate` holds the writing thread back."""

    content: bytes
    gate: threading.Event = field(default_factory=threading.Event)
    num_written: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def save_state(self, directory: Path, *, copy: bool) -> PendingPart:
        return PendingPart(self, directory, self.content)

    def load_state(self, directory: Path) -> None:
        self.content = (directory / "data").read_bytes()


@dataclass
class PendingPart:
    part: Part
    directory: Path
    content: bytes

    @property
    def summary(self) -> int:
        return len(self.content)

    def write(self) -> list[Path]:
        assert self.part.gate.wait(120)
        self.part.num_written += 1
        (self.directory / "data").write_bytes(self.content)
        return [self.directory / "data"]

    def finish(self, summaries: Sequence[int]) -> None:
        (self.directory / "about").write_text(str(summaries))


def store_in(directory: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(directory, CheckpointConfig(**{"interval": 1, **options}), recipe={"seed": 3}, ranks=Ranks())


def at(step: int) -> Progress:
    return Progress(step=step, prompt_cursor=10 * step, metrics_bytes=100 * step)


def save(store: CheckpointStore, part: Part, *steps: int) -> None:
    for step in steps:
        part.content = b"state %d " % step * 1000
        store.save(at(step), {"policy": part}, sources={})
    store.wait()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def newest(directory: Path) -> tuple[int | None, list[str]]:
    """The step of the newest sound checkpoint, and what was said."""
    said: list[str] = []
    manifest = store_in(directory).newest_sound(said.append)
    return manifest and manifest.progress.step, said


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    part = Part(b"")
    save(store_in(tmp_path), part, 4)
    expected, part.content = part.content, b"other"
    store = store_in(tmp_path)
    manifest = store.newest_sound(print)
    assert manifest is not None
    assert manifest.progress == at(4)
    assert manifest.recipe == {"seed": 3}
    assert manifest.files.keys() == {"policy/data", "policy/about"}
    store.restore(manifest, {"policy": part})
    assert part.content == expected
    assert (tmp_path / "latest").resolve() == (tmp_path / "step-00000004").resolve()


def test_an_empty_place_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])


def test_the_newest_ones_are_kept_and_every_so_many(tmp_path: Path) -> None:
    save(store_in(tmp_path, keep=2, keep_every=4), Part(b""), *range(1, 11))
    assert names(tmp_path) == {f"step-{step:08d}" for step in (4, 8, 9, 10)} | {"latest"}


def test_training_goes_on_while_a_checkpoint_is_written_and_one_alone(tmp_path: Path) -> None:
    part, store = Part(b"first"), store_in(tmp_path)
    part.gate.clear()
    store.save(at(1), {"policy": part}, sources={})
    part.content = b"changed"
    store.poll()
    assert newest(tmp_path / "elsewhere")[0] is None
    assert not (tmp_path / "step-00000001").exists()
    second = threading.Thread(target=store.save, args=(at(2), {"policy": part}), kwargs={"sources": {}})
    second.start()
    second.join(0.2)
    assert second.is_alive(), "a second copy would be held before the first is written"
    part.gate.set()
    second.join(120)
    store.wait()
    assert (tmp_path / "step-00000001" / "policy" / "data").read_bytes() == b"first"
    assert (tmp_path / "step-00000002" / "policy" / "data").read_bytes() == b"changed"


def test_poll_commits_what_is_written(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(at(1), {"policy": Part(b"x")}, sources={})
    assert store._save is not None
    store._save.thread.join(120)
    store.poll()
    assert newest(tmp_path) == (1, [])


def truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"0")


def another_step(file: Path) -> None:
    whole = json.loads(file.read_text())
    whole["content"]["progress"]["step"] += 1
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (truncate, "policy/data", "policy/data is truncated: 7999 of 8000 bytes"),
        (flip_a_bit, "policy/data", "policy/data is altered: its SHA-256 is another"),
        (append, "policy/data", "policy/data is too long: 8001 instead of 8000 bytes"),
        (Path.unlink, "policy/data", "policy/data is missing"),
        (flip_a_bit, "policy/about", "policy/about is altered"),
        (truncate, "manifest.json", "manifest.json is not a manifest"),
        (another_step, "manifest.json", "manifest.json is altered: its SHA-256 is another"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
    ],
)
def test_damage_is_named_and_the_newest_sound_checkpoint_is_used(
    tmp_path: Path, damage: Callable[[Path], None], file: str, words: str
) -> None:
    save(store_in(tmp_path, keep=3), Part(b""), 1, 2, 3)
    for step in (2, 3):
        damage(tmp_path / f"step-{step:08d}" / file)
    step, said = newest(tmp_path)
    assert step == 1
    assert len(said) == 2
    assert all(f"step-0000000{n} is damaged" in line and words in line for n, line in zip((3, 2), said, strict=True))
    assert names(tmp_path) == {"step-00000001", "damaged-step-00000002", "damaged-step-00000003", "latest"}
    save(store_in(tmp_path), Part(b""), 2)
    assert newest(tmp_path) == (2, [])


def test_a_run_does_not_begin_anew_because_all_its_checkpoints_are_damaged(tmp_path: Path) -> None:
    save(store_in(tmp_path), Part(b""), 1, 2)
    for step in (1, 2):
        flip_a_bit(tmp_path / f"step-{step:08d}" / "policy" / "data")
    with pytest.raises(ValueError, match=r"no sound checkpoint is left in .*policy/data is altered.*--fresh"):
        newest(tmp_path)


def test_leftovers_of_a_killed_run_are_no_checkpoints_and_are_removed(tmp_path: Path) -> None:
    save(store_in(tmp_path), Part(b""), 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.0123abcd")
    assert newest(tmp_path) == (1, [])
    assert names(tmp_path) == {"step-00000001", "latest"}


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "-o", "size=64k") as disk:
        part, store = Part(b""), store_in(disk, keep=1)
        save(store, part, 1)
        part.content = bytes(100_000)
        store.save(at(2), {"policy": part}, sources={})
        with pytest.raises(
            CheckpointWriteError,
            match=r"cannot write the checkpoint of step 2 \(.*: No space left on device\); free some space .*"
            r"run the same command again: it goes on from step-00000001",
        ):
            store.wait()
        assert names(disk) == {"step-00000001", "latest"}
        assert newest(disk) == (1, [])


def test_a_file_system_that_goes_away_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: PendingPart) -> list[Path]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.directory))

    store = store_in(tmp_path)
    save(store, Part(b""), 1)
    monkeypatch.setattr(PendingPart, "write", lost)
    store.save(at(2), {"policy": Part(b"")}, sources={})
    with pytest.raises(CheckpointWriteError, match=r"step 2 \(.*policy: Stale file handle\); .*goes on from step-0"):
        store.wait()
    assert newest(tmp_path) == (1, [])


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = store_in(disk)
        save(store, Part(b""), 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointWriteError, match=r"step 2 \(.*: Read-only file system\); .*goes on from step-0"):
            store.save(at(2), {"policy": Part(b"")}, sources={})
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert newest(disk) == (1, [])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"sha256": 1, "content": 2}', "[" * 100_000, "\x00", '{"content": {}, "sha256": "0"}', "nan"],
)
def test_what_is_no_manifest_is_called_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_progress_is_counted_in_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt_cursor .* is not a count"):
        Progress(step=1, prompt_cursor=value, metrics_bytes=0)


class FailingPart(Part):
    """Cannot be written on rank 1."""

    def save_state(self, directory: Path, *, copy: bool) -> PendingPart:
        pending = super().save_state(directory / "rank", copy=copy)
        (directory / "rank").mkdir(exist_ok=True)
        if dist.get_rank() == 1 and directory.name == "broken":
            pending.directory = directory / "none"
        return pending


def save_on_two_ranks(directory: Path) -> None:
    dist.init_process_group("gloo")
    try:
        store = CheckpointStore(directory, CheckpointConfig(), recipe={}, ranks=Ranks())
        store.save(at(1), {"sound": FailingPart(b"x")}, sources={})
        store.wait()
        words = "goes on from step-00000001" if dist.get_rank() == 1 else "failed on rank 1: FileNotFoundError"
        store.save(at(2), {"broken": FailingPart(b"x")}, sources={})
        with pytest.raises(RuntimeError, match=words):
            store.wait()
        manifest = store.newest_sound(pytest.fail)
        assert manifest is not None
        assert manifest.progress.step == 1
        dist.barrier()
        if dist.get_rank() == 0:
            flip_a_bit(directory / "step-00000001" / "sound" / "rank" / "data")
        dist.barrier()
        with pytest.raises((ValueError, RuntimeError), match="sound/rank/data is altered"):
            store.newest_sound(print)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_save_of_all(tmp_path: Path) -> None:
    run_ranks(2, save_on_two_ranks, tmp_path)
