"""Checks every op makes of its arguments before it picks a kernel."""

import torch
from torch import Tensor

HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_packed(cu_seqlens: Tensor, loss_mask: Tensor, **arrays: Tensor) -> None:
    """Raises ValueError unless `arrays` are [T] of one floating type, laid out by `cu_seqlens`, all on one device."""
    first = next(iter(arrays.values()))
    everything = {**arrays, "cu_seqlens": cu_seqlens, "loss_mask": loss_mask}
    given = _describe(**everything)
    if any(x.shape != (first.numel(),) for x in arrays.values()):
        raise ValueError(f"{' and '.join(arrays)} must be [T]: {given}")
    if any(x.dtype != first.dtype for x in arrays.values()) or first.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{' and '.join(arrays)} must all be float32 or all float64: {given}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [B + 1] int32: {given}")
    if loss_mask.shape != first.shape or loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be [T] bool: {given}")
    if any(x.device != cu_seqlens.device for x in everything.values()):
        raise ValueError(f"all arguments must be on one device: {given}")
    if cu_seqlens.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        _check_boundaries(cu_seqlens, first.numel())


def check_tokens(tokens: Tensor, cu_seqlens: Tensor) -> None:
    """Raises ValueError unless they are [T] int64, laid out by `cu_seqlens`, both on the CPU."""
    given = _describe(tokens=tokens, cu_seqlens=cu_seqlens)
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be [T] int64: {given}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [B + 1] int32: {given}")
    if tokens.device.type != "cpu" or cu_seqlens.device.type != "cpu":
        raise ValueError(f"all arguments must be on the CPU: {given}")
    _check_boundaries(cu_seqlens, tokens.numel())


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor | None) -> None:
    """Raises ValueError unless they are [T, H] and [V, H] of one type, [T] int64 and [T] bool, all on one device."""
    arrays = {"hidden": hidden, "weight": weight, "targets": targets}
    if loss_mask is not None:
        arrays["loss_mask"] = loss_mask
    given = _describe(**arrays)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be [T, H] and [V, H]: {given}")
    if hidden.dtype != weight.dtype or hidden.dtype not in HEAD_DTYPES:
        raise ValueError(f"hidden and weight must have one type of {HEAD_DTYPES}: {given}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be [{hidden.shape[0]}] int64: {given}")
    if loss_mask is not None and (loss_mask.shape != targets.shape or loss_mask.dtype != torch.bool):
        raise ValueError(f"loss_mask must be [{hidden.shape[0]}] bool: {given}")
    if any(x.device != hidden.device for x in arrays.values()):
        raise ValueError(f"all arguments must be on one device: {given}")


def check_value_head(hidden: Tensor, head: Tensor, **arrays: Tensor) -> None:
    """Raises ValueError unless they are [T, H] and [1, H] of one type, and `arrays` [T] float32 (float64 beside float64
    hidden), all on one device."""
    given = _describe(hidden=hidden, head=head, **arrays)
    if hidden.ndim != 2 or head.shape != (1, hidden.shape[-1]):
        raise ValueError(f"hidden and head must be [T, H] and [1, H]: {given}")
    if hidden.dtype != head.dtype or hidden.dtype not in HEAD_DTYPES:
        raise ValueError(f"hidden and head must have one type of {HEAD_DTYPES}: {given}")
    expected = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if any(x.shape != hidden.shape[:1] or x.dtype != expected for x in arrays.values()):
        raise ValueError(f"{', '.join(arrays)} must be [{hidden.shape[0]}] {expected}: {given}")
    if any(x.device != hidden.device for x in (head, *arrays.values())):
        raise ValueError(f"all arguments must be on one device: {given}")


def _check_boundaries(cu_seqlens: Tensor, num_tokens: int) -> None:
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {num_tokens} packed tokens, but is {bounds}")


def _describe(**arrays: Tensor) -> str:
    return ", ".join(
        f"{name} is {str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}" for name, x in arrays.items()
    )
