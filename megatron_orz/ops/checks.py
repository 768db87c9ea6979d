"""Checks every op makes of its arguments before it picks a kernel."""

import torch
from torch import Tensor


def check_packed(cu_seqlens: Tensor, **arrays: Tensor) -> None:
    """Raises ValueError unless `arrays` are [T] of one floating type, laid out by `cu_seqlens`, all on one device."""
    first = next(iter(arrays.values()))
    given = ", ".join(f"{name} is {_describe(x)}" for name, x in {**arrays, "cu_seqlens": cu_seqlens}.items())
    if any(x.shape != (first.numel(),) for x in arrays.values()):
        raise ValueError(f"{' and '.join(arrays)} must be [T]: {given}")
    if any(x.dtype != first.dtype for x in arrays.values()) or first.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{' and '.join(arrays)} must all be float32 or all float64: {given}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [B + 1] int32: {given}")
    if any(x.device != cu_seqlens.device for x in arrays.values()):
        raise ValueError(f"all arguments must be on one device: {given}")
    if cu_seqlens.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != first.numel() or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to the {first.numel()} packed tokens, but is {bounds}")


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
