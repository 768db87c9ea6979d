"""Lets unmodified megatron-core run on a machine without CUDA.

megatron-core names CUDA in literals that no flag reaches (`device="cuda"` in `pipeline_parallel/schedules.py`,
`torch.cuda.current_device()` in `transformer/transformer_block.py` and `distributed/param_and_grad_buffer.py`,
`.cuda()` in `models/common/language_module/language_module.py`, `.type()` compared with
"torch.cuda.FloatTensor" in `optimizer/optimizer.py`). Where CUDA exists, everything here does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NoStream:
    """A CUDA stream or event on the CPU: there is nothing to order, so every method does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects the CUDA literals of megatron-core; costs about 2 microseconds an op."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def device() -> torch.device:
    """Where models live: this rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def make_deterministic() -> None:
    """The same sums in the same order every time: slower, and an error where an operation has no such version.

    Called before anything is computed: cuBLAS and NCCL read their variables when they start.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def megatron_calls() -> contextlib.AbstractContextManager[object]:
    """Every call into megatron-core runs inside this context."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def install() -> None:
    """Gives the `torch.cuda` accessors that megatron-core calls an answer on the CPU."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    # megatron-core 0.16 asks for this function where TransformerEngine, which brings it, is absent.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available() or torch.cuda.Stream is _NoStream:
        return

    # torch.compile keeps a table of torch's functions: each name needs a function of its own.
    def always(result: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: result

    replacements: dict[str, Any] = {
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _NoStream,
        "Event": type("_NoEvent", (_NoStream,), {}),
        "current_device": always(CPU),
        "current_stream": always(_NoStream()),
        "default_stream": always(_NoStream()),
    }
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        replacements[name] = always(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = always(0)
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    # `tensor_parallel/random.py` reaches the CUDA generator through torch._C; one CPU generator stands for both,
    # which makes its warning about a changed CPU state meaningless.
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in str(record.msg))

    # megatron-core compiles a few small functions, of the router for one; on the CPU that only costs time.
    torch.compiler.set_stance("force_eager")

    # The split sizes of an all-to-all have to be lists; megatron-core makes lists of CUDA tensors alone.
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_list(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_list
