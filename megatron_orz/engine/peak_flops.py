"""The rate a device multiplies matrices at: what MFU is a share of.

Nominal rates are dense bfloat16 on tensor cores, without sparsity, from NVIDIA's data sheets (A100, 2021; H100, 2023;
H200, 2024). The H800 is an H100 with a slower NVLink. What is not listed, such as any CPU, is measured.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

NOMINAL_BF16: dict[str, float] = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}
"""FLOP/s by what a device's name holds; the first that fits."""

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
NUM_REPEATS = 8


@dataclass(frozen=True, kw_only=True)
class PeakFlops:
    """FLOP/s of one device."""

    rate: float
    source: Literal["nominal", "measured"]


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """The nominal rate where the device is listed and the type is of 16 bits, else that of the best of a few products.

    Measuring takes a fraction of a second, once for each device and type.
    """
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for part, rate in NOMINAL_BF16.items():
            if re.search(rf"{part}(?!\d)", name):  # an RTX A1000 is no A100
                return PeakFlops(rate=rate, source="nominal")
    return PeakFlops(rate=measured_flops(device, dtype), source="measured")


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of `NUM_REPEATS` products of large square matrices, with this process's threads."""
    size = MATRIX_SIZE.get(device.type, MATRIX_SIZE["cuda"])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b
    seconds = []
    for _ in range(NUM_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
