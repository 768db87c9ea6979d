"""Builds `megatron_orz._C`, the C++ and CUDA kernels. Everything else about the project is in pyproject.toml.

The extension is optional: without a C++ compiler or the Python headers the package installs without it, and its ops
run their plain PyTorch reference. CUDA kernels are built where torch and nvcc are of one major version of CUDA, for
Ampere and Hopper unless TORCH_CUDA_ARCH_LIST names others; no GPU is needed. An error while compiling is an error.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# PTX is for the GPUs after Hopper: the driver compiles it when it first loads the extension.
ARCHITECTURES = "8.0;9.0+PTX"


def what_is_missing() -> str | None:
    """What keeps this machine from compiling the extension, or None."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler}); install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')}; install Python's development files"
    return None


def what_is_missing_for_cuda() -> str | None:
    """What keeps this machine from compiling the CUDA kernels, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    nvcc = Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
    if not nvcc.exists():
        return f"no {nvcc}; install the toolkit of CUDA {torch.version.cuda}, or set CUDA_HOME to where it is"
    header = nvcc.parents[1] / "include" / "cuda_runtime.h"
    if not header.exists():
        return f"no {header}; set CUDA_HOME to the directory of the toolkit of CUDA {torch.version.cuda}"
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    release = re.search(r"release (\d+)\.\d+", report)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else report
        return f"torch is built for CUDA {torch.version.cuda}, but {nvcc} is of {found}; set CUDA_HOME to one that fits"
    return None


def extensions() -> list[Extension]:
    if missing := what_is_missing():
        print(f"megatron_orz: {missing}. Installing without the C++ kernels.", file=sys.stderr)
        return []
    sources = [Path("csrc/bindings.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    # Without OpenMP, at::parallel_for runs on one thread. no-psabi: vectors pass through inlined functions only.
    flags = {"cxx": ["-O3", "-Wall", "-Wno-psabi", "-fopenmp"]}
    if missing := what_is_missing_for_cuda():
        print(f"megatron_orz: {missing}. Building the C++ kernels for the CPU alone.", file=sys.stderr)
        kind = CppExtension
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        sources += [*Path("csrc/cuda").glob("*.cpp"), *Path("csrc/cuda").glob("*.cu")]
        flags["nvcc"] = ["-O3"]
        kind = CUDAExtension
    headers = [path for pattern in ("**/*.h", "**/*.cuh") for path in Path("csrc").glob(pattern)]
    return [
        kind(
            "megatron_orz._C",
            sources=sorted(map(str, sources)),
            depends=sorted(map(str, headers)),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
