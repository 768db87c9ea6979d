"""The doctor finds what is planted: other versions, broken packages, small limits, missing tools."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.doctor import machine, packages
from megatron_orz.doctor.command import Arguments
from megatron_orz.doctor.findings import Finding
from megatron_orz.doctor.matrix import MATRIX, Pin

ROOT = Path(__file__).parents[2]
GIB = 2**30


def plant(site: Path, name: str, version: str, source: str | None = None) -> None:
    """A package as pip would leave it; `source` is its __init__.py."""
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if source is not None:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(source)


def doctor(*options: str, site: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code, and the findings by subject. site: what Python finds before anything that is installed."""
    path = os.pathsep.join(map(str, filter(None, [site, ROOT])))
    done = subprocess.run(
        [sys.executable, "tools/doctor.py", "--json", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    return done.returncode, {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}


def pin(name: str, **changes: Any) -> Pin:
    values = {"cpu": "1.0", "cuda": "1.0", "reason": "", "cost": "a cost"} | changes
    return Pin(name=name, **values)


def test_other_versions_are_costs_and_the_tested_ones_are_in_order(tmp_path: Path) -> None:
    plant(tmp_path, "torch", "9.9.9")
    plant(tmp_path, "transformers", "5.19.0+local")
    _, findings = doctor("--no-imports", "--target", "cpu", site=tmp_path)
    assert findings["torch"]["verdict"] == "costly"
    assert findings["torch"]["found"] == "9.9.9, tested: 2.13.0"
    assert findings["torch"]["remedy"] == "pip install --no-deps torch==2.13.0"
    assert findings["transformers"]["verdict"] == "ok"
    assert "vllm" not in findings, "it belongs to the other target"


def test_what_is_missing_is_broken_or_has_a_cost() -> None:
    matrix = [pin("surely-not-installed"), pin("nor-this", is_needed=False), pin("of-cuda-alone", cpu=None)]
    broken, costly = packages.check_versions(matrix, "cpu")
    assert (broken.verdict, costly.verdict) == ("broken", "costly")
    assert "pip install --no-deps nor-this==1.0" in costly.remedy


def test_the_exit_code_tells_of_broken_things(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from megatron_orz.doctor import command

    monkeypatch.setattr(command, "MATRIX", [pin("surely-not-installed")])
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--no-imports", "--target", "cpu"])
    assert command.run(Console(width=300)) == 1
    assert "1 broken" in capsys.readouterr().out
    monkeypatch.setattr(command, "MATRIX", [pin("surely-not-installed", is_needed=False)])
    assert command.run(Console(width=300)) == 0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("import os; os.abort()", "killed by signal 6"),
        ("import os; os._exit(7)", "fails"),
        ("import time; time.sleep(300)", "no end after 2 s"),
        ("print('all is well')", ""),
    ],
)
def test_an_import_that_fails_crashes_or_hangs_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    plant(tmp_path, "planted", "1.0", source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = packages.check_imports(
        [pin("planted", module="planted")], "cpu", timeout_s=2 if "sleep" in source else 300
    )
    if said:
        assert (finding.verdict, finding.cost) == ("broken", "a cost")
        assert said in finding.found
    else:
        assert finding.verdict == "ok"


def test_a_crash_in_a_package_does_not_crash_the_doctor(tmp_path: Path) -> None:
    plant(tmp_path, "simpy", "4.1.2", "import os; os.abort()")
    for name in ("torch", "transformers", "numpy", "safetensors"):
        plant(tmp_path, name, "0.1", "")
    code, findings = doctor("--target", "cpu", site=tmp_path)
    assert findings["import simpy"]["found"].startswith("killed by signal 6")
    assert findings["import simpy"]["verdict"] == "costly"
    assert findings["C++ kernels"]["verdict"] == "costly", "the torch it would load is an empty package"
    # megatron.core needs the torch that was replaced.
    assert findings["import megatron.core"]["verdict"] == "broken"
    assert code == 1


def test_only_a_cuda_machine_needs_driver_and_nvcc(tmp_path: Path) -> None:
    subjects = {
        target: [f.subject for f in machine.check_machine(target, folder=tmp_path)] for target in ("cpu", "cuda")
    }
    assert set(subjects["cuda"]) - set(subjects["cpu"]) == {"NVIDIA driver", "nvcc"}


@pytest.mark.parametrize(
    ("release", "verdict"), [("release 13.0, V13.0.48", "ok"), ("release 12.4, V12.4.1", "costly"), ("?", "costly")]
)
def test_nvcc_must_be_of_torchs_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, verdict: str
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {release}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.check_nvcc().verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed\n", "ok"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release\n", "costly"),
        ("nothing\n", "costly"),
        (None, "costly"),
    ],
)
def test_an_old_driver_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, verdict: str
) -> None:
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert machine.check_driver().verdict == verdict


def test_small_limits_and_full_disks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = GIB // 4

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage)
    for finding in (machine.check_shm(), machine.check_disk(tmp_path)):
        assert finding.verdict == "costly"
        assert "0.2" in finding.found
        assert finding.cost
        assert finding.remedy


def test_few_open_files_are_found_in_the_process_itself() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        finding = machine.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.verdict == "costly"
    assert finding.remedy.startswith("ulimit -n 4096")


def test_a_missing_compiler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    finding = machine.check_compiler()
    assert (finding.verdict, finding.found) == ("costly", "no no-such-compiler")


def test_a_machine_without_loopback_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: tuple[str, int]) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert machine.check_loopback().verdict == "broken"


def test_the_extension_of_this_checkout_is_seen_as_torch_sees_it() -> None:
    import torch

    from megatron_orz.ops.extension import has_kernel

    finding = packages.check_extension("cpu", timeout_s=300)
    assert (finding.verdict == "ok") == has_kernel("packed_gae", "cpu")
    on_cuda = packages.check_extension("cuda", timeout_s=300)
    assert (on_cuda.verdict == "ok") == has_kernel("packed_gae", "cuda")
    assert torch.version.cuda is not None or "for the CPU alone" in on_cuda.found or finding.verdict != "ok"


def test_every_finding_that_is_not_ok_has_a_cost_and_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every package, missing or of another version, and of a machine that has too little of everything."""
    for name in ("LEAST_SHM_GIB", "LEAST_DISK_GIB", "LEAST_MEMORY_GIB"):
        monkeypatch.setattr(machine, name, math.inf)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "absent")
    monkeypatch.setenv("CXX", "no-such-compiler")
    unwell: list[Finding] = []
    for installed in (None, "0.0"):
        monkeypatch.setattr(packages, "installed_version", lambda name, installed=installed: installed)
        unwell += packages.check_versions(MATRIX, "cuda")
    of_machine = [f for f in machine.check_machine("cuda", folder=tmp_path) if f.verdict != "ok"]
    assert {f.subject for f in of_machine} >= {"C++ compiler", "NVIDIA driver", "/dev/shm", "disk", "memory"}
    unwell += of_machine
    assert all(finding.verdict != "ok" for finding in unwell)
    assert all(finding.cost and finding.remedy for finding in unwell)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeout_s": 0.0}, "is not a deadline"),
        ({"folder": Path("no-such-folder")}, "is no directory"),
        ({"server": Path("no-such-model")}, r"holds no config\.json"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arguments(**changes)


@pytest.mark.slow
def test_a_real_server_is_started_and_stopped() -> None:
    from megatron_orz.doctor.command import check_server

    model = ROOT / "runs" / "demo-base" / "final"
    if not model.exists():
        pytest.skip("needs the demo's base model: python examples/demo_base.py")
    assert check_server(model).verdict == "ok"
