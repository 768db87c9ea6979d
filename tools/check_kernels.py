"""Compiles the CUDA kernels and tells what each costs a multiprocessor; needs nvcc, but no GPU.

python tools/check_kernels.py
python tools/check_kernels.py --archs 90

Prints registers a thread, static shared memory a block and spilled bytes a thread, of every kernel on every
architecture. Fails if a kernel does not compile, warns, or spills, or if the binding to torch does not compile against
this torch, which may be a CPU build. Cubins are left in build/kernels.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table
from torch.utils.cpp_extension import include_paths

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, read_command

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"

# Those torch gives to nvcc, so that kernels compile alike in the extension.
FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-Werror=all-warnings",
    "-Wno-deprecated-gpu-targets",
]

# The generated header of c10/cuda is missing from CPU builds of torch; it only says how c10 was linked.
BINDING_FLAGS = ["-std=c++20", "-Xcompiler=-fsyntax-only,-Wall,-Werror", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
COMPILE_TIMEOUT_S = 1200.0


@dataclass(frozen=True)
class Arguments:
    """Compiles the CUDA kernels and prints the registers and spills of each."""

    archs: tuple[int, ...] = (80, 90)
    """Compute capabilities times ten."""
    max_spill_bytes: int = 0
    """Spill stores plus loads allowed a thread."""
    build_dir: Path = Path("build/kernels")
    """Where the cubins go."""


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel; bytes."""

    file: str
    kernel: str
    arch: int
    registers: int
    shared: int
    spills: int


def main() -> None:
    with plain_errors():
        check(read_command(Arguments))


def check(arguments: Arguments) -> None:
    """Prints the table. Raises RuntimeError for what does not compile, or spills."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("kernels-check skipped: there is no nvcc on PATH, so nothing was compiled; install the CUDA toolkit")
        return
    arguments.build_dir.mkdir(parents=True, exist_ok=True)

    def compile_kernels(job: tuple[Path, int]) -> list[Usage]:
        source, arch = job
        cubin = arguments.build_dir / f"{source.stem}.sm_{arch}.cubin"
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source), "-o", str(cubin)]
        return parse_ptxas(compiler_report(command, source), source.name, arch)

    def check_binding(source: Path) -> None:
        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        unwritten = str(arguments.build_dir / f"{source.stem}.o")
        compiler_report([nvcc, *BINDING_FLAGS, *includes, "-c", str(source), "-o", unwritten], source)

    with ThreadPoolExecutor() as pool:
        binding = pool.submit(check_binding, CUDA / "bindings.cpp")
        parts = pool.map(compile_kernels, product(sorted(CUDA.glob("*.cu")), arguments.archs))
        usages = [usage for part in parts for usage in part]
        binding.result()
    terminal.console().print(table(usages))
    spilling = [u for u in usages if u.spills > arguments.max_spill_bytes]
    if spilling:
        raise RuntimeError(f"{len(spilling)} kernels spill more than {arguments.max_spill_bytes} bytes")
    num_kernels = len({(u.file, u.kernel) for u in usages})
    print(
        f"{num_kernels} kernels for {arguments.archs}, none with more than {arguments.max_spill_bytes} bytes of spills;"
        " their binding to torch compiles"
    )


def compiler_report(command: list[str], source: Path) -> str:
    """What the compiler says on stderr. Raises RuntimeError with it if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S)
    if result.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stderr


def parse_ptxas(report: str, file: str, arch: int) -> list[Usage]:
    """Usages from the output of `nvcc -Xptxas -v`, in its order.

    For each kernel it has a line with the mangled name, one with spills and one with registers.
    """
    usages = []
    for part in report.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        if name is None or registers is None:
            raise RuntimeError(f"ptxas reports {file} in an unknown form:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        usages.append(Usage(file, readable(name[1]), arch, int(registers[1]), int(shared[1]) if shared else 0, spills))
    return usages


def readable(mangled: str) -> str:
    """The name and template arguments of a kernel, `logits_stats_kernel<512, 4>`; as given without c++filt."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\w+::", "", name.removeprefix("void "))
    name = re.sub(r"\((?:int|bool)\)", "", name)
    return name.split("(")[0]


def table(usages: list[Usage]) -> Table:
    """A line for each kernel; registers, shared memory and spills as one column for each architecture."""
    archs = sorted({u.arch for u in usages})
    columns = [(what, arch) for what in ("registers", "shared", "spills") for arch in archs]
    result = terminal.table(None, ["kernel", "file"], [f"sm_{arch} {what}" for what, arch in columns])
    for file, kernel in sorted({(u.file, u.kernel) for u in usages}):
        of_arch = {u.arch: u for u in usages if (u.file, u.kernel) == (file, kernel)}
        result.add_row(kernel, file, *(str(getattr(of_arch[arch], what)) for what, arch in columns))
    return result


if __name__ == "__main__":
    main()
