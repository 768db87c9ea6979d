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


@cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether `op` has a kernel for this device. The first no for each is logged: the caller runs the reference."""
    if NOT_BUILT is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_orz::{op}", device_type.upper()):
        return True
    reason = f"the extension is not built ({NOT_BUILT})" if NOT_BUILT else f"no {device_type} kernel is built"
    logger.warning("%s: %s; running the slower PyTorch reference", op, reason)
    return False


if __name__ == "__main__":
    print("C++ kernels: built" if NOT_BUILT is None else f"C++ kernels: none ({NOT_BUILT}); PyTorch does their work")
