"""The most memory that exists at once: allocated bytes of this rank's GPU, or resident ones of a process on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET_PEAK = "5"
"""The request to let VmHWM begin anew at VmRSS (proc(5))."""


def forget_peak(device: torch.device) -> None:
    """Lets the peak begin anew at what there is. Raises OSError where the kernel does not allow that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _CLEAR_REFS.write_text(_FORGET_PEAK)


def peak_bytes(device: torch.device) -> int:
    """The most since `forget_peak`, or since the process began."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def held_bytes(device: torch.device) -> int:
    """What there is. A CPU's allocator keeps some of what was freed for the next time: that is resident, too."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Of this process, in host memory."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
