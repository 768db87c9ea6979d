"""Loads `megatron_orz._C`, which defines `torch.ops.megatron_orz.*`, and tells which kernels it brings.

`python -m megatron_orz.ops.extension` says whether it is there.
"""

import importlib
import logging
from functools import cache

import torch

NOT_BUILT: str | None
"""Why the extension is missing; None when it is there."""

try:
    importlib.import_module("megatron_orz._C")
    NOT_BUILT = None
except ImportError as error:
    NOT_BUILT = str(error)

logger = logging.getLogger(__name__)


FLOAT64_ON_CUDA = {"packed_gae"}
"""Ops whose CUDA kernel takes float64 as well; on the CPU all do."""


@cache
def has_kernel(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `op` has a kernel for this device and type. The first no is logged: the caller runs the reference."""
    # An extension older than its sources may lack an op altogether.
    is_defined = NOT_BUILT is None and hasattr(torch.ops.megatron_orz, op)
    is_built = is_defined and torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_orz::{op}", device_type.upper())
    is_typed = device_type != "cuda" or dtype != torch.float64 or op in FLOAT64_ON_CUDA
    if is_built and is_typed:
        return True
    if is_built:
        reason = f"its {device_type} kernel does not take {dtype}"
    else:
        reason = f"the extension is not built ({NOT_BUILT})" if NOT_BUILT else f"no {device_type} kernel is built"
    logger.warning("%s: %s; running the slower PyTorch reference", op, reason)
    return False


if __name__ == "__main__":
    print("C++ kernels: built" if NOT_BUILT is None else f"C++ kernels: none ({NOT_BUILT}); PyTorch does their work")
