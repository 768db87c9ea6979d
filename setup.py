"""Builds `megatron_orz._C`, the C++ kernels. Everything else about the project is in pyproject.toml.

The extension is optional: without a C++ compiler or the Python headers the package installs without it, and its ops
run their plain PyTorch reference. An error while compiling is an error.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


def what_is_missing() -> str | None:
    """What keeps this machine from compiling the extension, or None."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler}); install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')}; install Python's development files"
    return None


def extensions() -> list[Extension]:
    if missing := what_is_missing():
        print(f"megatron_orz: {missing}. Installing without the C++ kernels.", file=sys.stderr)
        return []
    return [
        CppExtension(
            "megatron_orz._C",
            sources=sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-O3", "-Wall"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
