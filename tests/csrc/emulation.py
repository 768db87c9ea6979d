"""Compiles csrc/cuda for the SIMT emulator and calls its launchers with numpy arrays.

    run("logits_stats", logits, targets, 0, stats, n, v, 1.0, True)     # arrays in place of pointers; no stream

Every array is copied between guard zones, and back after the call; each call is repeated with blocks and threads in
other orders, and must give the same bits. `emulated_ops` does without: it calls the launchers through the binding.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulator"

# Misaligned accesses and reads past a fixed array trap.
SANITIZE = "-fsanitize=alignment,bounds,shift,signed-integer-overflow -fsanitize-undefined-trap-on-error"
FLAGS = f"-std=c++17 -O1 -fPIC -Wall -Werror -Wno-unknown-pragmas -fno-strict-aliasing {SANITIZE}".split()

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)

# p: pointer, l: int64, i: dtype, b: bool, f: float, d: double. A stream follows where a launcher takes one.
KINDS = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "b": ctypes.c_bool,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
LAUNCHERS = {
    "logits_stats": "pplp llfb",
    "dlogits": "pplppppp illf",
    "packed_value_loss": "ppi ppppppp llf",
    "packed_gae": "ppi pppppp ldd",
    "launch_barrier_under_a_branch": "",
    "launch_race": "p",
}
SIZES = {
    "packed_value_loss_workspace_bytes": "ll",
    "packed_gae_workspace_bytes": "l",
}

SCHEDULES = (0, 1, 20_011)
GUARD_BYTES = 256


def run(name: str, *arguments: Any, misalign: Sequence[np.ndarray] = ()) -> None:
    """Calls a launcher under every schedule. Arrays begin on 64 bytes, those in `misalign` one element after."""
    results = []
    for schedule in SCHEDULES:
        library().set_schedule(schedule)
        shifted = [id(x) for x in misalign]
        memory = {id(x): _Guarded(x, id(x) in shifted) for x in arguments if isinstance(x, np.ndarray)}
        _function(name)(*(memory[id(x)].address if id(x) in memory else x for x in arguments))
        _raise_error()
        for guarded in memory.values():
            guarded.check(name)
        results.append(memory)
    for other in results[1:]:
        for key, guarded in results[0].items():
            assert other[key].bytes == guarded.bytes, f"{name}: results depend on the order of threads"
    for x in arguments:
        if isinstance(x, np.ndarray):
            x[...] = np.frombuffer(results[0][id(x)].bytes, x.dtype).reshape(x.shape)


def workspace(name: str, *sizes: int) -> np.ndarray:
    """Poisoned scratch memory for a launcher."""
    num_bytes = _function(f"{name}_workspace_bytes")(*sizes)
    return np.full(num_bytes, 0xFF, np.uint8)


def poison(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An output nobody has written: NaN, or all bits set."""
    return np.frombuffer(b"\xff" * (int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()


def as_float64(x: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of a type of torch. x: float32, or the bits of numbers of 16 bits."""
    if dtype == "float32":
        return x.astype(np.float64)
    return torch.from_numpy(x.view(np.int16)).view(getattr(torch, dtype)).double().numpy()


class _Guarded:
    """A copy of an array between guard zones; as numbers, the zones are NaN."""

    def __init__(self, x: np.ndarray, misalign: bool) -> None:
        assert x.flags.c_contiguous
        self.buffer = np.full(x.nbytes + 2 * GUARD_BYTES + 64, 0xFF, np.uint8)
        first = -self.buffer.ctypes.data % 64 + GUARD_BYTES + (x.itemsize if misalign else 0)
        self.span = slice(first, first + x.nbytes)
        self.buffer[self.span] = np.frombuffer(x.tobytes(), np.uint8)
        self.address = self.buffer.ctypes.data + first

    @property
    def bytes(self) -> bytes:
        return self.buffer[self.span].tobytes()

    def check(self, name: str) -> None:
        outside = np.delete(self.buffer, self.span)
        assert (outside == 0xFF).all(), f"{name} wrote outside an array"


def _raise_error() -> None:
    text = ctypes.create_string_buffer(200)
    library().take_error(text, ctypes.c_size_t(len(text)))
    if text.value:
        raise RuntimeError(text.value.decode())


@cache
def _function(name: str) -> Any:
    address = library().address_of(name.encode())
    if name in SIZES:
        return ctypes.CFUNCTYPE(ctypes.c_size_t, *(KINDS[k] for k in SIZES[name]))(address)
    kinds = [KINDS[k] for k in LAUNCHERS[name].replace(" ", "")]
    if name.startswith("launch_"):
        return ctypes.CFUNCTYPE(None, *kinds)(address)
    launcher = ctypes.CFUNCTYPE(None, *kinds, ctypes.c_void_p)(address)
    return lambda *arguments: launcher(*arguments, None)


@cache
def library() -> ctypes.CDLL:
    """The emulated launchers, compiled on first use."""
    sources = [*sorted(CUDA.glob("*.cu")), HERE / "emulated.cpp"]
    headers = [*sorted(CUDA.glob("*.cuh")), CUDA / "kernels.h", HERE / "emulator.h"]
    loaded = ctypes.CDLL(str(_build(sources, headers, FLAGS, [])))
    loaded.address_of.restype = ctypes.c_void_p
    return loaded


@cache
def emulated_ops() -> Any:
    """torch.ops.emulated: the CUDA binding on CPU tensors. Compiled on first use."""
    launchers = Path(library()._name)
    sources = [HERE / "emulated_ops.cpp"]
    headers = [CUDA / "bindings.cpp", CUDA / "kernels.h", *CSRC.glob("*.h"), *HERE.glob("c10/cuda/*.h")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror"]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    libraries += [str(launchers), f"-Wl,-rpath,{launchers.parent}"]
    torch.ops.load_library(_build(sources, headers, flags, libraries))
    return torch.ops.emulated


def _build(sources: list[Path], headers: list[Path], flags: list[str], libraries: list[str]) -> Path:
    """A shared library of the sources, in a file named by the hash of all that goes into it."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    digest = hashlib.sha256(" ".join([compiler, torch.__version__, *flags, *libraries]).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.name.encode() + path.read_bytes())
    built = BUILD / f"{digest.hexdigest()[:16]}.so"
    if built.exists():
        return built
    scratch = BUILD / f"{built.stem}.{os.getpid()}"
    scratch.mkdir(parents=True)

    def compile_one(source: Path) -> str:
        compiled = str(scratch / f"{source.name}.o")
        subprocess.run([compiler, *flags, f"-I{HERE}", "-x", "c++", "-c", str(source), "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, "-shared", "-o", str(scratch / "all.so"), *objects, *libraries], check=True)
    (scratch / "all.so").replace(built)
    shutil.rmtree(scratch)
    return built
