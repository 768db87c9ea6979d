"""What is wrong with a checkpoint is one error that names it, and leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_orz.conversion import convert
from megatron_orz.conversion.convert import plan_hf_to_megatron, plan_megatron_to_hf
from tests.conversion.checkpoints import run, save_policy, tensors_of

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in both forms, each in several files."""
    path = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MAX_SHARD_BYTES", 200_000)
        patch.setattr(convert, "TORCH_DIST_FILE_BYTES", 200_000)
        run(plan_hf_to_megatron(save_policy(path / "source", "llama"), path / "megatron"))
        run(plan_megatron_to_hf(path / "megatron", path / "hf"))
    return path


def refused(
    plan: Callable[[Path, Path], object], checkpoint: Path, directory: Path, damage: Damage, error: str
) -> None:
    source = shutil.copytree(checkpoint, directory / "source")
    damage(source)
    with pytest.raises(ValueError, match=error) as caught:
        plan(source, directory / "output")
    assert str(directory) in str(caught.value), "the error names the place"
    assert [path.name for path in directory.iterdir()] == ["source"]


def truncate(name: str) -> Damage:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) - 100])

    return damage


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """The checkpoint as one file, with other tensors."""

    def damage(path: Path) -> None:
        tensors = tensors_of(path)
        for file in path.glob("model*"):
            file.unlink()
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def edit_config(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    return damage


def edit_index(path: Path) -> None:
    """The index looks for a tensor in another shard."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def name_shard(name: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: name}}))

    return damage


SHARD = "model-00002-of-00003.safetensors"
Q, K = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: (path / SHARD).unlink(), rf"{SHARD} cannot be read \(No such file.*; copy the checkpoint again"),
        (truncate(SHARD), rf"{SHARD} cannot be read .*; copy the checkpoint again"),
        (lambda path: (path / SHARD).write_text("{}"), rf"{SHARD} cannot be read"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), "is not a safetensors index"),
        *(
            (name_shard(name), f"{re.escape(repr(name))} is no safetensors file of the checkpoint's own directory")
            for name in ("", ".", "..", "../model.safetensors", "config.json", "model.safetensors\0", ".safetensors")
        ),
        (edit_index, r"model-00001-of-00003.safetensors holds no tensor model\.norm\.weight, but the index says so"),
        (lambda path: [file.unlink() for file in path.glob("model*")], "holds neither model.safetensors nor its index"),
        (lambda path: (path / "config.json").unlink(), r"holds no config\.json"),
        (edit_tensors(lambda tensors: tensors.pop(Q)), f"holds no tensor {re.escape(Q)}; its config.json asks for it"),
        (
            edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
            r"holds 1 tensors its config\.json does not account for, e\.g\. extra",
        ),
        (
            edit_tensors(lambda tensors: tensors.update({Q: torch.zeros(32, 64)})),
            rf"{re.escape(Q)} has shape \[32, 64\], config.json asks for \[64, 64\]",
        ),
        (
            edit_tensors(lambda tensors: tensors.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
            f"{re.escape(Q)} is stored as I8; save the checkpoint in float32, bfloat16 or float16",
        ),
        (
            edit_tensors(lambda tensors: tensors.update({K: tensors[K].bfloat16()})),
            f"{re.escape(K)} is torch.bfloat16.*save them in one type",
        ),
        (edit_config(num_hidden_layers=5), r"holds no tensor model\.layers\.4\.input_layernorm\.weight"),
        (edit_config(num_hidden_layers=3), r"does not account for, e\.g\. model\.layers\.3\."),
    ],
)
def test_a_damaged_hugging_face_checkpoint_is_refused(
    checkpoints: Path, tmp_path: Path, damage: Damage, error: str
) -> None:
    refused(plan_hf_to_megatron, checkpoints / "hf", tmp_path, damage, error)


NORM = "decoder.final_layernorm.weight"


def edit_metadata(change: Callable[[dict[str, Any]], object], of: str = "state_dict_metadata") -> Damage:
    def damage(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(getattr(metadata, of))
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: (path / "__0_1.distcp").unlink(), r"__0_1\.distcp is missing; copy the checkpoint again"),
        (truncate("__0_1.distcp"), r"__0_1\.distcp is truncated: \d+ of \d+ bytes; copy the checkpoint again"),
        (truncate(".metadata"), r"\.metadata cannot be read .*; copy the checkpoint again"),
        (lambda path: (path / "metadata.json").unlink(), r"metadata\.json does not describe a distributed checkpoint"),
        (
            lambda path: (path / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            "sharded_backend 'zarr' is not supported, only 'torch_dist'",
        ),
        (lambda path: (path / "config.json").unlink(), r"holds no config\.json"),
        (
            edit_metadata(lambda tensors: tensors.pop(NORM)),
            f"holds no tensor {re.escape(NORM)}; its config.json asks for it",
        ),
        (
            edit_metadata(
                lambda places: [places.pop(index) for index in [*places] if index.fqn == NORM], "storage_data"
            ),
            rf"does not say where {re.escape(NORM)} lies at \[0\]; copy the checkpoint again",
        ),
        (
            edit_metadata(lambda tensors: setattr(tensors[NORM].properties, "dtype", torch.float64)),
            rf"{re.escape(NORM)} is stored as torch\.float64; name a --dtype to convert it to",
        ),
        (edit_config(num_hidden_layers=3), r"does not account for, e\.g\. decoder\.layers\.3\."),
        (
            edit_config(intermediate_size=90),
            r"linear_fc1\.weight has shape \[192, 64\], config.json asks for \[180, 64\]",
        ),
        (edit_config(vocab_size=132), r"has shape \[131, 64\], config.json asks for \[132, 64\]"),
    ],
)
def test_a_damaged_distributed_checkpoint_is_refused(
    checkpoints: Path, tmp_path: Path, damage: Damage, error: str
) -> None:
    refused(plan_megatron_to_hf, checkpoints / "megatron", tmp_path, damage, error)


def test_damage_found_while_reading_leaves_nothing(checkpoints: Path, tmp_path: Path) -> None:
    """The headers are whole; the data of a chunk is not."""
    source = shutil.copytree(checkpoints / "megatron", tmp_path / "source")
    content = bytearray((source / "__0_1.distcp").read_bytes())
    content[:500] = bytes(500)
    (source / "__0_1.distcp").write_bytes(content)
    conversion = plan_megatron_to_hf(source, tmp_path / "output")
    with pytest.raises(ValueError, match=r"__0_1\.distcp cannot be read at .*; copy the checkpoint again"):
        conversion.run(lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_saved_in_part_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    def drop_a_chunk(tensors: dict[str, Any]) -> None:
        tensors[NORM].chunks.clear()

    source = shutil.copytree(checkpoints / "megatron", tmp_path / "source")
    edit_metadata(drop_a_chunk)(source)
    with pytest.raises(ValueError, match=f"holds {re.escape(NORM)} in part only"):
        plan_megatron_to_hf(source, tmp_path / "output").run(lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
