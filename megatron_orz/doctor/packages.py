"""Which packages are installed, of which version, and whether they can be imported.

Versions are read from what pip wrote, without importing anything. Imports are tried in processes of their own, so that
one that crashes, hangs or ends the interpreter is a finding.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_orz.doctor.findings import Finding, ill, well
from megatron_orz.doctor.matrix import Pin, Target

INSTALL: Mapping[Target, str] = {
    "cpu": "make setup",
    "cuda": "pip install --no-deps --requirement requirements-cuda.lock (docs/install.md)",
}

EXTENSION = "C++ kernels"
_REAP_S = 30.0  # in which processes that were killed are gone
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "available": cuda, "nccl_built": nccl,
    "nccl": list(torch.cuda.nccl.version()) if cuda and nccl else None,
    "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
}))
"""
EXTENSION_PROBE = """
import json
from megatron_orz.ops.extension import NOT_BUILT
import torch
has = lambda device: NOT_BUILT is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "megatron_orz::packed_gae", device)
print(json.dumps({"reason": NOT_BUILT, "cpu": has("CPU"), "cuda": has("CUDA")}))
"""


def installed_version(name: str) -> str | None:
    """Of a package, or of Python; None where it is not installed."""
    if name == "python":
        return "{}.{}".format(*sys.version_info)
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions(matrix: Iterable[Pin], target: Target) -> Iterator[Finding]:
    """Every package of the target beside its tested version. A local part (`+cpu`) does not count."""
    for pin in matrix:
        tested = pin.version(target)
        if tested is None:
            continue
        found = installed_version(pin.name)
        if found is None:
            yield ill(
                pin.name,
                "not installed",
                cost=pin.cost,
                remedy=f"{INSTALL[target]}; or pip install --no-deps {pin.name}=={tested}",
                is_needed=pin.is_needed,
            )
        elif found.split("+")[0] == tested:
            yield well(pin.name, found)
        else:
            remedy = (
                f"install Python {tested}" if pin.name == "python" else f"pip install --no-deps {pin.name}=={tested}"
            )
            yield ill(
                pin.name,
                f"{found}, tested: {tested}",
                cost="this combination is untested",
                remedy=remedy,
                # Another Python than those of any lock has no wheels for the rest.
                is_needed=pin.name == "python" and found not in (pin.cpu, pin.cuda),
            )


def check_imports(matrix: Iterable[Pin], target: Target, *, timeout_s: float) -> list[Finding]:
    """Imports what is installed, several at a time; those that work are not reported one by one."""
    pins = [p for p in matrix if p.module and p.version(target) and installed_version(p.name)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        answers = pool.map(lambda pin: run_python(f"import {pin.module}", timeout_s=timeout_s), pins)
        failures = [
            ill(
                f"import {pin.module}",
                problem,
                cost=pin.cost,
                remedy=f"python -c 'import {pin.module}' shows all of it; then {INSTALL[target]}"
                + (f"; on a busy machine, --timeout-s {2 * timeout_s:g}" if problem.startswith("no end") else ""),
                is_needed=pin.is_needed,
            )
            for pin, (problem, _) in zip(pins, answers, strict=True)
            if problem
        ]
    return failures or [well("imports", f"all {len(pins)} work")]


def check_torch(target: Target, *, timeout_s: float) -> list[Finding]:
    """What torch sees of the GPUs."""
    if target == "cpu" or installed_version("torch") is None:
        return []
    problem, seen = _probe(TORCH_PROBE, timeout_s=timeout_s)
    if problem:
        return []  # the import says so
    if not seen["cuda"]:
        remedy = "install the CUDA build of torch: requirements-cuda.lock"
        return [ill("torch", f"{seen['version']} is built without CUDA", cost="no GPU is used", remedy=remedy)]
    if not seen["available"]:
        remedy = f"run nvidia-smi; the driver must support CUDA {seen['cuda']}, and a container needs --gpus all"
        return [ill("GPUs", "torch sees none", cost="everything runs on the CPU", remedy=remedy)]
    findings = [well("GPUs", ", ".join(seen["gpus"]))]
    if seen["nccl"]:
        findings.append(well("NCCL", ".".join(map(str, seen["nccl"]))))
    else:
        remedy = "install torch from requirements-cuda.lock"
        findings.append(ill("NCCL", "not in torch", cost="ranks on GPUs cannot meet", remedy=remedy, is_needed=True))
    return findings


def check_extension(target: Target, *, timeout_s: float) -> Finding:
    """Whether csrc is built, and for what."""
    slower = "PyTorch does their work: slower, and with more memory"
    build = "python setup.py build_ext --inplace"
    if installed_version("torch") is None:
        return ill(EXTENSION, "need torch", cost=slower, remedy=INSTALL[target])
    problem, built = _probe(EXTENSION_PROBE, timeout_s=timeout_s)
    if problem:
        return ill(EXTENSION, problem, cost=slower, remedy=build)
    if built["reason"]:
        return ill(EXTENSION, f"not built ({built['reason']})", cost=slower, remedy=build)
    if not built["cpu"]:
        return ill(EXTENSION, "built from other sources", cost=slower, remedy=build)
    if target == "cuda" and not built["cuda"]:
        remedy = f"set CUDA_HOME to the toolkit of torch's CUDA, then {build}"
        return ill(EXTENSION, "built for the CPU alone", cost=f"on GPUs, {slower}", remedy=remedy)
    return well(EXTENSION, "built for the CPU and CUDA" if built["cuda"] else "built for the CPU")


def run_python(code: str, *, timeout_s: float) -> tuple[str, str]:
    """Runs code in a new interpreter; what went wrong, or an empty text, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.communicate(timeout=_REAP_S)
        return f"no end after {timeout_s:g} s", ""
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}{_last_line(said)}", printed
    if process.returncode:
        return f"fails{_last_line(said)}", printed
    return "", printed


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""


def _probe(code: str, *, timeout_s: float) -> tuple[str, dict[str, Any]]:
    problem, printed = run_python(code, timeout_s=timeout_s)
    if problem:
        return problem, {}
    answer: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return "", answer
