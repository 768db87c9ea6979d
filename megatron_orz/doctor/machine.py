"""What a machine offers beside Python packages: compilers, drivers, limits, space."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_orz.doctor.findings import Finding, ill, well
from megatron_orz.doctor.matrix import Target

SHM = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")
GIB = 2**30
LEAST_SHM_GIB = 1.0
LEAST_OPEN_FILES = 4096
"""A trainer holds a connection for every request in flight, 768 at most, and each rank a few for every other one."""
LEAST_DISK_GIB = 20.0
LEAST_MEMORY_GIB = 8.0
LEAST_DRIVER = 580
"""The first driver for CUDA 13."""


def check_machine(target: Target, *, folder: Path) -> Iterator[Finding]:
    """Everything that can be seen without torch. folder: where runs would be written."""
    yield check_compiler()
    if target == "cuda":
        yield check_driver()
        yield check_nvcc()
    yield check_shm()
    yield check_open_files()
    yield check_disk(folder)
    yield check_memory()
    yield check_loopback()


def check_compiler() -> Finding:
    """Whether csrc can be compiled."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    cost = "csrc cannot be built: PyTorch does the work of its kernels"
    if shutil.which(compiler) is None:
        return ill("C++ compiler", f"no {compiler}", cost=cost, remedy="install g++, or set CXX")
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        return ill("C++ compiler", f"no Python.h in {include}", cost=cost, remedy="install Python's development files")
    return well("C++ compiler", compiler)


def check_nvcc() -> Finding:
    """Whether the CUDA kernels can be compiled."""
    cost = "the CUDA kernels of csrc cannot be built: PyTorch does their work on GPUs"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return ill("nvcc", "absent", cost=cost, remedy="install the toolkit of CUDA 13.0, or set CUDA_HOME")
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return ill("nvcc", f"{nvcc} does not run ({error})", cost=cost, remedy="install the toolkit of CUDA 13.0 anew")
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    found = release[1] if release else "of no known release"
    if not found.startswith("13."):
        return ill("nvcc", f"{found}, tested: 13.0", cost=cost, remedy="set CUDA_HOME to a toolkit of CUDA 13")
    return well("nvcc", found)


def check_driver() -> Finding:
    """Whether the kernel has a driver that CUDA 13 can use."""
    if not DRIVER.exists():
        return ill(
            "NVIDIA driver",
            "none",
            cost="no GPU is used",
            remedy=f"install driver {LEAST_DRIVER} or newer; in a container, start it with --gpus all",
        )
    number = re.search(r"\b(\d{3,})\.\d+", DRIVER.read_text())
    if number is None or int(number[1]) < LEAST_DRIVER:
        found = number[0] if number else "of no known version"
        remedy = f"install driver {LEAST_DRIVER} or newer"
        return ill("NVIDIA driver", found, cost="too old for CUDA 13: no GPU is used", remedy=remedy)
    return well("NVIDIA driver", number[0])


def check_shm() -> Finding:
    """Free space of shared memory."""
    free = shutil.disk_usage(SHM).free / GIB if SHM.is_dir() else 0.0
    if free < LEAST_SHM_GIB:
        return ill(
            str(SHM),
            f"{free:.2f} GiB free, {LEAST_SHM_GIB:g} wanted",
            cost="NCCL and the workers of servers with server_tp > 1 meet there, and may fail to start",
            remedy="docker run --shm-size 16g (or --ipc host); delete files that dead processes left there",
        )
    return well(str(SHM), f"{free:.1f} GiB free")


def check_open_files() -> Finding:
    """Limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        return ill(
            "ulimit -n",
            f"{soft}, {LEAST_OPEN_FILES} wanted",
            cost="many servers and ranks may run out of connections",
            remedy=f"ulimit -n {LEAST_OPEN_FILES}"
            + ("" if hard >= LEAST_OPEN_FILES else ", after root raised the limit"),
        )
    return well("ulimit -n", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def check_disk(folder: Path) -> Finding:
    """Free space where runs are written."""
    free = shutil.disk_usage(folder).free / GIB
    if free < LEAST_DISK_GIB:
        return ill(
            "disk",
            f"{free:.1f} GiB free in {folder}, {LEAST_DISK_GIB:g} wanted",
            cost="checkpoints of real models may not fit: a run that cannot write stops",
            remedy="free some space, or put run_dir on another disk",
        )
    return well("disk", f"{free:.0f} GiB free")


def check_memory() -> Finding:
    """Host memory, as far as it is available."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    available = int(fields["MemAvailable"]) * 1024 / GIB
    if available < LEAST_MEMORY_GIB:
        return ill(
            "memory",
            f"{available:.1f} GiB available, {LEAST_MEMORY_GIB:g} wanted",
            cost="trainer and server of the demo may be killed",
            remedy="end other programs",
        )
    return well("memory", f"{available:.0f} GiB available")


def check_loopback() -> Finding:
    """Whether servers can listen on this machine."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return well("loopback", "can be listened on")
    except OSError as error:
        return ill(
            "loopback",
            str(error),
            cost="neither servers nor ranks can meet",
            remedy="bring the interface up: ip link set lo up",
            is_needed=True,
        )
