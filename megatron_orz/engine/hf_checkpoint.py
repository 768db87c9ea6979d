"""Hugging Face checkpoints, read tensor by tensor from mapped safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.dtypes import SAFETENSORS_DTYPES
from megatron_orz.engine.weight_table import weight_table
from megatron_orz.json_file import read_json

INDEX_FILE = "model.safetensors.index.json"


class HFCheckpoint:
    """The safetensors files of a Hugging Face checkpoint."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when a file is missing or damaged."""
        self.path = path
        self.files = _tensor_files(path)
        self._handles: dict[Path, Any] = {}

    @property
    def has_value_head(self) -> bool:
        return "score.weight" in self.files

    def check_names(self, architecture: Architecture, *, value_head: bool) -> None:
        """Raises ValueError when the checkpoint holds tensors that the architecture does not account for."""
        known = {name for entry in weight_table(architecture, value_head=value_head) for name in entry.hf}
        known |= {"lm_head.weight"}  # a copy of the embedding where these are tied; of no use to a critic
        if value_head:
            known |= {"score.bias"}
            self._check_score_bias()
        unknown = sorted(name for name in self.files if name not in known and "rotary_emb" not in name)
        if unknown:
            raise ValueError(
                f"{self.path} holds {len(unknown)} tensors its config.json does not account for, e.g. {unknown[0]}; "
                "check that both are of the same model"
            )

    def _check_score_bias(self) -> None:
        """The value head has no bias: transformers wants one in the file, and it has to be zero."""
        if "score.bias" in self.files and self.read("score.bias", (1,)).any():
            raise ValueError(f"{self.path}: score.bias is not zero, but the value head has no bias; remove it")

    def dtype(self, tensors: Mapping[str, tuple[int, ...]]) -> torch.dtype:
        """The type the tensors share; their data is not read.

        Raises ValueError when one is missing, damaged or not of the given shape, or their types differ.
        """
        dtypes = {name: self._check(name, shape) for name, shape in tensors.items()}
        if len(set(dtypes.values())) > 1:
            raise ValueError(
                f"{self.path}: {', '.join(f'{name} is {dtype}' for name, dtype in dtypes.items())}; "
                "Megatron keeps them in one tensor, so save them in one type"
            )
        return next(iter(dtypes.values()))

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, mapped from its file. Raises ValueError when it is missing, damaged or not of this shape."""
        self._check(name, shape)
        tensor: Tensor = self._open(name).get_tensor(name)
        return tensor

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Raises ValueError when the tensor is missing, or of a type that is not supported."""
        if name not in self.files:
            raise ValueError(f"{self.path} holds no tensor {name}; its config.json asks for it")
        try:
            header = self._open(name).get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.files[name]} holds no tensor {name}, but the index says so; copy the checkpoint again"
            ) from error
        if header.get_dtype() not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{self.path}: {name} is stored as {header.get_dtype()}; "
                "save the checkpoint in float32, bfloat16 or float16"
            )
        return tuple(header.get_shape()), SAFETENSORS_DTYPES[header.get_dtype()]

    def _check(self, name: str, expected: tuple[int, ...]) -> torch.dtype:
        """The type of the tensor."""
        shape, dtype = self.shape_and_dtype(name)
        if shape != expected:
            raise ValueError(
                f"{self.path}: {name} has shape {list(shape)}, config.json asks for {list(expected)}; "
                "copy the checkpoint again"
            )
        return dtype

    def _open(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._handles:
            self._handles[path] = open_safetensors(path)
        return self._handles[path]


def open_safetensors(path: Path) -> Any:
    """The file, opened with `safe_open`. Raises ValueError when it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the checkpoint again") from error


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = path / INDEX_FILE
    if index.is_file():
        try:
            weight_map = read_json(index)["weight_map"]
            for file in weight_map.values():
                if file != Path(file).name or Path(file).suffix != ".safetensors" or "\0" in file:
                    raise ValueError(f"{file!r} is no safetensors file of the checkpoint's own directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not a safetensors index ({type(error).__name__}: {error}); copy the checkpoint again"
            ) from error
        return {name: path / file for name, file in weight_map.items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{path} holds neither model.safetensors nor its index; save the checkpoint as safetensors")
    return dict.fromkeys(open_safetensors(single).keys(), single)
