"""The metadata of a distributed checkpoint runs nothing."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_orz.engine.checkpoint_metadata import METADATA_FILE, read_metadata


def metadata(*, file: str = "__0_0.distcp", offset: int = 0, size: tuple[int, ...] = (2, 3)) -> Metadata:
    """Of a checkpoint with one tensor."""
    zeros = torch.Size([0] * len(size))
    stored = TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.bfloat16),
        size=torch.Size(size),
        chunks=[ChunkStorageMetadata(zeros, torch.Size(size))],
    )
    place = {MetadataIndex("weight", zeros, 0): _StorageInfo(file, offset, 12)}
    return Metadata(state_dict_metadata={"weight": stored}, storage_data=place)


def write(directory: Path, content: Any) -> Path:
    (directory / METADATA_FILE).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return directory


def test_descriptions_of_tensors_are_read(tmp_path: Path) -> None:
    assert read_metadata(write(tmp_path, metadata())) == metadata()


class Runs:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "hostile",
    [
        Runs(os.system, "touch pwned"),
        Runs(eval, "open('pwned', 'w')"),
        Runs(exec, "open('pwned', 'w')"),
        Runs(getattr, "text", "upper"),
        Runs(torch.load, "other.pt"),
        Runs(__import__, "antigravity"),
        {"key": [Runs(os.mkdir, "pwned")]},
    ],
)
def test_a_pickle_that_names_a_function_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"describes no tensor\); copy the checkpoint again, from a source you trust"):
        read_metadata(write(tmp_path, hostile))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (metadata(file="../../secret"), "'../../secret' is not a file of the checkpoint"),
        (metadata(file="/etc/passwd"), "'/etc/passwd' is not a file of the checkpoint"),
        (metadata(offset=-1), "weight lies nowhere"),
        (metadata(size=(2, -3)), "weight has a shape that no tensor has"),
        ({"weight": 1}, "it holds a dict"),
        (b"", "EOFError"),
        (pickle.dumps(metadata())[:-20], "cannot be read"),
    ],
)
def test_what_describes_no_checkpoint_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_metadata(write(tmp_path, content))


def test_a_memo_index_of_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    # PROTO 4, an empty dict, LONG_BINPUT 2^31 - 1: 32 GiB for an unpickler whose memo is an array.
    (tmp_path / METADATA_FILE).write_bytes(b"\x80\x04}r\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="it holds a dict"):
        read_metadata(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
