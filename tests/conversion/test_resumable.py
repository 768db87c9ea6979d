"""Outputs are whole or absent; what was interrupted goes on where it stopped."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from megatron_orz.conversion import convert, resumable
from megatron_orz.conversion.convert import Conversion, plan_hf_to_megatron, plan_megatron_to_hf
from tests.conversion.checkpoints import assert_same_tensors, run, save_policy

Plan = Callable[[Path, Path], Conversion]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 100_000)
    monkeypatch.setattr(convert, "TORCH_DIST_FILE_BYTES", 100_000)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("forms")
    run(plan_hf_to_megatron(save_policy(path / "hf", "qwen2"), path / "megatron"))
    return {"hf": path / "hf", "megatron": path / "megatron"}


PLANS = pytest.mark.parametrize(
    ("form", "plan"), [("hf", plan_hf_to_megatron), ("megatron", plan_megatron_to_hf)], ids=["to_megatron", "to_hf"]
)


def interrupt_after(num_bytes: int) -> Callable[[int], None]:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if done > num_bytes:
            raise KeyboardInterrupt

    return advance


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@PLANS
def test_an_interrupted_conversion_goes_on_after_the_last_finished_file(
    forms: dict[str, Path], tmp_path: Path, form: str, plan: Plan
) -> None:
    conversion = plan(forms[form], tmp_path / "output")
    with pytest.raises(KeyboardInterrupt):
        conversion.run(interrupt_after(conversion.num_bytes // 2))
    assert [path.name for path in tmp_path.iterdir()] == [".output.unfinished"]
    unfinished = tmp_path / ".output.unfinished"
    first, *_ = sorted(name for name in contents(unfinished) if name.endswith((".distcp", ".safetensors")))
    before = (unfinished / first).stat()

    assert run(plan(forms[form], tmp_path / "output"))
    after = (tmp_path / "output" / first).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "a finished file is not rewritten"
    run(plan(forms[form], tmp_path / "at_once"))
    assert contents(tmp_path / "output") == contents(tmp_path / "at_once")
    assert {path.name for path in tmp_path.iterdir()} == {"output", "at_once"}


@PLANS
def test_a_complete_output_is_left_alone(forms: dict[str, Path], tmp_path: Path, form: str, plan: Plan) -> None:
    assert run(plan(forms[form], tmp_path / "output"))
    before = contents(tmp_path / "output")
    assert not run(plan(forms[form], tmp_path / "output"))
    assert contents(tmp_path / "output") == before


def test_another_source_starts_anew(tmp_path: Path) -> None:
    other = save_policy(tmp_path / "other", "qwen2")
    conversion = plan_hf_to_megatron(other, tmp_path / "output")
    with pytest.raises(KeyboardInterrupt):
        conversion.run(interrupt_after(conversion.num_bytes // 2))
    os.utime(other / "model.safetensors", ns=(1, 1))  # saved again in between
    run(plan_hf_to_megatron(other, tmp_path / "output"))
    run(plan_megatron_to_hf(tmp_path / "output", tmp_path / "again"))
    assert_same_tensors(other, tmp_path / "again")


def test_an_output_that_holds_something_else_is_kept(forms: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="output exists and is not this output; remove it"):
        plan_hf_to_megatron(forms["hf"], tmp_path / "output").run(lambda _: None)
    assert contents(tmp_path / "output") == {"thesis.tex": b"precious"}


def test_two_conversions_into_one_output_are_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".output.lock"),
        pytest.raises(ValueError, match=r"another process is writing .*output; wait for it"),
    ):
        plan_hf_to_megatron(forms["hf"], tmp_path / "output").run(lambda _: None)


def test_an_output_that_another_process_finishes_meanwhile_is_left_alone(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears after the first look, before the lock is taken."""
    conversion = plan_hf_to_megatron(forms["hf"], tmp_path / "output")
    acquire = FileLock.acquire

    def acquire_late(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(resumable.FileLock, "acquire", acquire)
        assert run(plan_hf_to_megatron(forms["hf"], tmp_path / "output"))
        return acquire(*args, **options)

    monkeypatch.setattr(resumable.FileLock, "acquire", acquire_late)
    assert not conversion.run(lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_disk_without_space_is_found_before_writing(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = resumable.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"has 0.0 GiB free, but the output still needs \d\.\d GiB; free some space"):
        plan_hf_to_megatron(forms["hf"], tmp_path / "output").run(lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_write_that_fails_leaves_nothing(forms: dict[str, Path], tmp_path: Path, command: str) -> None:
    """The system refuses to let a file grow past 100 kB, as it would on a full disk."""
    source = forms["hf" if command == "hf-to-megatron" else "megatron"]
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "runpy.run_path('tools/convert.py', run_name='__main__')"
    )
    arguments = [command, "--input", str(source), "--output", str(tmp_path / "output")]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: cannot write" in result.stderr
    assert "File too large; free some space or name another --output" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
