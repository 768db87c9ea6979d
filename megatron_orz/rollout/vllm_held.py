"""The weights that a vLLM worker computes with, traced back to the Hugging Face tensors they came from.

Loaders cut tensors and fuse them with others. Where each part goes is not written down here: it is seen, while the
loaders copy. What a module computes with afterwards is read out of the module itself, from its kernel's packed copy
where that is what it computes with: bit by bit, but for zeros (see `digests.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_orz.rollout.digests import Block, digest
from megatron_orz.rollout.vllm_repack import held_columns


@dataclass(frozen=True)
class Copy:
    """A part of a Hugging Face tensor, and where in a parameter it went; both as blocks of matrices."""

    source: Block
    target: Block


class HeldWeights:
    """Which parameter of a model holds which part of which Hugging Face tensor, and digests of what it holds."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._copies: dict[str, dict[tuple[torch.nn.Module, str], dict[Copy, None]]] = {}
        self._seen: set[str] = set()  # tensors of the current update
        # The key of a storage is its address: keeping the tensors keeps it from being used again.
        self._owners: dict[int, tuple[torch.nn.Module, str, Tensor]] = {}

    def start(self) -> None:
        """The model is ready to be loaded anew: none of its parameters has been replaced yet."""
        self._seen.clear()
        self._owners = {
            parameter.untyped_storage()._cdata: (module, name, parameter)
            for module in self._model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }

    @contextmanager
    def seen(self, tensors: Sequence[tuple[str, Tensor]]) -> Iterator[None]:
        """Watches where the loaders copy these tensors while the body loads them."""
        with _CopyWatch(self, tensors):
            yield
        self._seen.update(name for name, _ in tensors)

    def record(self, name: str, source: Tensor, num_columns: int, target: Tensor) -> None:
        """A loader copies `source`, a view of the tensor `name`, to `target`."""
        owner = self._owners.get(target.untyped_storage()._cdata)
        if owner is None:
            return
        module, parameter_name, parameter = owner
        origin = Block.of(source, num_columns=num_columns)
        target_block = Block.of(target, num_columns=_num_columns(parameter))
        if origin is not None and target_block is not None:
            copies = self._copies.setdefault(name, {}).setdefault((module, parameter_name), {})
            copies[Copy(origin, target_block)] = None

    def finish(self, needed: Sequence[tuple[torch.nn.Module, str]]) -> None:
        """Raises RuntimeError with the names of what the current update has left out.

        needed: the parameters that must be loaded.
        """
        self._owners = {}
        if forgotten := sorted(self._copies.keys() - self._seen):
            raise RuntimeError(f"{len(forgotten)} tensors got no new weight, among them {forgotten[0]}")
        filled: defaultdict[tuple[torch.nn.Module, str], set[Block]] = defaultdict(set)
        for places in self._copies.values():
            for place, copies in places.items():
                filled[place] |= {copy.target for copy in copies}
        for module, name in needed:
            # The rows that fill up a vocabulary come from no checkpoint.
            num_filled = sum(block.numel for block in filled[module, name])
            numel = _loaded_shape(module, name).numel()
            if num_filled < numel and not (num_filled and isinstance(module, VocabParallelEmbedding)):
                raise RuntimeError(
                    f"{self._names[module]}.{name}: {numel - num_filled} of {numel} elements got no new weight"
                )

    def digests(self, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """What the model holds of each tensor: blocks of it (`Block`), the digest of each, and the place it is in.

        A tensor that is in several places, as a tied embedding, has as many copies of its blocks.
        """
        wanted: defaultdict[tuple[torch.nn.Module, str], list[tuple[str, Copy]]] = defaultdict(list)
        for name in names:
            for place, copies in self._copies.get(name, {}).items():
                for home in self._homes(*place):
                    wanted[home] += [(name, copy) for copy in copies]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for (module, parameter_name), parts in wanted.items():
            sums = [0] * len(parts)
            num_columns = (1, *_loaded_shape(module, parameter_name))[-1]
            for first, columns in held_columns(module, parameter_name, num_columns):
                for index, (_, copy) in enumerate(parts):
                    sums[index] += _digest_of(copy, columns, first)
            for (name, copy), value in zip(parts, sums, strict=True):
                where = f"{self._names[module]}.{parameter_name}"
                found[name].append({"block": copy.source, "digest": value % 2**64, "place": where})
        return found

    def _homes(self, module: torch.nn.Module, name: str) -> Iterator[tuple[torch.nn.Module, str]]:
        """The parameter, and those of other modules that are the same one: each may have a repacked copy."""
        yield module, name
        parameter = getattr(module, name)
        for other in self._model.modules():
            for other_name, candidate in other._parameters.items():
                if candidate is parameter and other is not module:
                    yield other, other_name


class _CopyWatch(TorchDispatchMode):
    """Tells `HeldWeights` of every copy out of one of the tensors."""

    def __init__(self, held: HeldWeights, tensors: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._held = held
        self._tensors = sorted(tensors, key=lambda item: item[1].data_ptr())
        self._addresses = [tensor.data_ptr() for _, tensor in self._tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not args[1].is_meta:
            self._record(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _record(self, target: Tensor, source: Tensor) -> None:
        index = bisect_right(self._addresses, source.data_ptr()) - 1
        if index < 0:
            return
        name, tensor = self._tensors[index]
        offset = source.data_ptr() - tensor.data_ptr()
        if offset < tensor.nbytes:
            within = source.as_strided(source.shape, source.stride(), offset // source.element_size())
            self._held.record(name, within, _num_columns(tensor), target)


def _num_columns(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 1


def _loaded_shape(module: torch.nn.Module, name: str) -> torch.Size:
    """The shape in which a parameter is loaded; repacking may leave an empty one behind."""
    loaded = get_layerwise_info(module).restore_metadata[0].get(name)
    return (getattr(module, name) if loaded is None else loaded).shape


def _digest_of(copy: Copy, columns: Tensor, first: int) -> int:
    """The part of a copy's digest that lies in these columns of the parameter, the first of which is `first`."""
    source, target = copy.source, copy.target
    begin = max(first, target.column)
    end = min(first + columns.shape[1], target.column + target.num_columns)
    if begin >= end:
        return 0
    held = columns[target.row : target.row + target.num_rows, begin - first : end - first]
    return digest(held, row=source.row, column=source.column + begin - target.column)
