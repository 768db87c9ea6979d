"""Whatever lies in a checkpoint directory: it is read, or refused by a ValueError that names a file; nothing is run."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from megatron_orz.checkpoint.manifest import MANIFEST_FILE, FileDigest, Manifest, Progress
from megatron_orz.conversion import resumable
from megatron_orz.conversion.resumable import JOURNAL, OutputFile, write_directory
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.checkpoint_metadata import METADATA_FILE, read_metadata
from megatron_orz.engine.hf_checkpoint import INDEX_FILE, HFCheckpoint
from megatron_orz.engine.torch_dist import FORMAT, FORMAT_FILE, TorchDistCheckpoint
from tests.engine import tiny
from tests.engine.test_checkpoint_metadata import metadata
from tests.fuzz.inputs import altered, damaged, fuzz, json_values, refusal, sizes

PICKLED = pickle.dumps(metadata())


@sizes(slow=12_000)
def test_metadata_of_distributed_checkpoints(num_inputs: int, tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_text(json.dumps(FORMAT))

    def check_metadata(content: bytes) -> None:
        (tmp_path / METADATA_FILE).write_bytes(content)
        refused_or_none(lambda: read_metadata(tmp_path), tmp_path)
        refused_or_none(lambda: TorchDistCheckpoint(tmp_path), tmp_path)

    fuzz(damaged(PICKLED), named(check_metadata, "check_metadata"), num_inputs=num_inputs)


@sizes(slow=4_000)
def test_format_of_distributed_checkpoints(num_inputs: int, tmp_path: Path) -> None:
    (tmp_path / METADATA_FILE).write_bytes(PICKLED)

    def check_format(content: bytes) -> None:
        (tmp_path / FORMAT_FILE).write_bytes(content)
        refused_or_none(lambda: TorchDistCheckpoint(tmp_path), tmp_path)

    fuzz(json_files(FORMAT), named(check_format, "check_format"), num_inputs=num_inputs)


@sizes(slow=6_000)
def test_indices_of_hugging_face_checkpoints(num_inputs: int, tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}

    def check_index(content: bytes) -> None:
        (tmp_path / INDEX_FILE).write_bytes(content)

        def read() -> None:
            for name in (checkpoint := HFCheckpoint(tmp_path)).files:
                assert checkpoint.files[name].parent == tmp_path
                checkpoint.shape_and_dtype(name)

        refused_or_none(read, tmp_path)

    fuzz(json_files(index), named(check_index, "check_index"), num_inputs=num_inputs)


def safetensors_file(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


HEADER = {"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}


@sizes(slow=6_000)
def test_safetensors_files(num_inputs: int, tmp_path: Path) -> None:
    def check_safetensors(content: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)

        def read() -> None:
            checkpoint = HFCheckpoint(tmp_path)
            for name in checkpoint.files:
                shape, _ = checkpoint.shape_and_dtype(name)
                assert checkpoint.read(name, shape).shape == torch.Size(shape)

        refused_or_none(read, tmp_path)

    files = altered(HEADER).map(safetensors_file) | damaged(safetensors_file(HEADER))
    fuzz(files, named(check_safetensors, "check_safetensors"), num_inputs=num_inputs)


@sizes(slow=2_000)
def test_configs_of_models(num_inputs: int, tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def check_config(content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        refused_or_none(lambda: read_architecture(tmp_path), tmp_path)

    fuzz(json_files(config), named(check_config, "check_config"), num_inputs=num_inputs)


@sizes(slow=2_000)
def test_journals_of_conversions(num_inputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted conversion goes on, or begins anew; a finished one is what was asked for, or refused."""
    monkeypatch.setattr(resumable.os, "fsync", lambda descriptor: None)
    target, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    identity = {"source": "model"}
    files = [OutputFile(name=name, num_bytes=1, write=lambda stream, advance: stream.write(b"x")) for name in "ab"]

    def check_journal(case: tuple[bool, bytes]) -> None:
        is_finished, content = case
        for directory in (target, unfinished):
            if directory.exists():
                for file in directory.iterdir():
                    file.unlink()
                directory.rmdir()
        directory = target if is_finished else unfinished
        directory.mkdir()
        (directory / JOURNAL).write_bytes(content)

        def write() -> None:
            finish: Any = lambda path, written: None  # noqa: E731
            write_directory(target, files, identity=identity, finish=finish, advance=lambda count: None)
            assert json.loads((target / JOURNAL).read_text())["identity"] == identity

        refused_or_none(write, tmp_path)

    journals = json_files({"identity": identity, "finished": {"a": 1}})
    fuzz(st.tuples(st.booleans(), journals), named(check_journal, "check_journal"), num_inputs=num_inputs)


@sizes(slow=6_000)
def test_manifests_of_checkpoints(num_inputs: int, tmp_path: Path) -> None:
    """Whatever is altered: the same manifest, which JSON can spell in many ways, or none."""
    progress = Progress(step=4, prompt_cursor=12, metrics_bytes=100)
    digest = FileDigest(num_bytes=3, sha256="ab")
    manifest = Manifest(
        progress=progress, world_size=2, recipe={"seed": 0, "lr": 1e-3}, versions={"torch": "2"}, files={"a": digest}
    )
    manifest.write(tmp_path)
    whole = (tmp_path / MANIFEST_FILE).read_bytes()

    def check_manifest(content: bytes) -> None:
        (tmp_path / MANIFEST_FILE).write_bytes(content)
        found: list[Manifest] = []
        refused_or_none(lambda: found.append(Manifest.read(tmp_path)), tmp_path)
        assert found in ([], [manifest])

    fuzz(json_files(json.loads(whole)) | damaged(whole), named(check_manifest, "check_manifest"), num_inputs=num_inputs)


def json_files(document: Any) -> st.SearchStrategy[bytes]:
    whole = json.dumps(document).encode()
    nested = st.integers(1, 50_000).map(lambda depth: b'{"a":' * depth)
    return altered(document).map(lambda d: json.dumps(d).encode()) | damaged(whole) | json_values.map(_encode) | nested


def _encode(document: Any) -> bytes:
    return json.dumps(document).encode()


def refused_or_none(read: Callable[[], object], directory: Path) -> None:
    message = refusal(read)
    assert message is None or str(directory) in message


def named(check: Any, name: str) -> Any:
    check.__qualname__ = name
    return check
