"""Hugging Face checkpoints out of a run: what transformers and vLLM load as they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from megatron_orz.ranks import exhausting
from megatron_orz.types import NamedWeights

MAX_SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_AND_CONFIG = (".json", ".jinja", ".model", ".txt")
"""Suffixes of what goes with the weights; whatever else a checkpoint holds may be its old weights in another format."""
ABOUT_WEIGHTS = ("metadata.json", "conversion.json")
"""Files of a distributed checkpoint and of a conversion that describe the weights beside them."""


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the body ends without an error, and vanishes otherwise.

    What `path` held before is replaced.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
        if path.exists():
            path.replace(replaced)
        unfinished.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def export_hf(
    weights: NamedWeights, *, source: Path, target: Path, is_writer: bool, chat_template: str | None = None
) -> None:
    """Writes the weights as safetensors beside the config and tokenizer of `source`; whole or not at all.

    A critic, whose weights name a `score.weight`, becomes a token classifier with one label.
    chat_template: Jinja text that replaces the tokenizer's, if it has one.
    Collective: every rank consumes `weights`, one of them writes. Raises RuntimeError when the disk does not take it.
    """
    try:
        with exhausting(weights):
            if is_writer:
                with atomic_directory(target) as directory:
                    copy_companions(source, directory)
                    if chat_template is not None:
                        write_chat_template(directory, chat_template)
                    dtype, names = _write_shards(_with_score_bias(weights), directory)
                    write_config(directory / "config.json", dtype, value_head="score.weight" in names)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"cannot write the checkpoint {target}: {error}; free some space or change run_dir"
        ) from error


def copy_companions(source: Path, directory: Path) -> None:
    """Copies what goes with the weights: config, generation config, tokenizer, chat template."""
    for file in source.iterdir():
        is_about_weights = file.name.endswith(".index.json") or file.name in ABOUT_WEIGHTS
        if file.is_file() and file.suffix in TOKENIZER_AND_CONFIG and not is_about_weights:
            shutil.copy(file, directory / file.name)


def write_chat_template(directory: Path, chat_template: str) -> None:
    """Gives the tokenizer of a checkpoint its chat template, in whichever place it had another one before."""
    config_file = directory / "tokenizer_config.json"
    if config_file.exists():
        config = json.loads(config_file.read_text())
        if config.pop("chat_template", None) is not None:
            config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (directory / "chat_template.json").unlink(missing_ok=True)
    (directory / CHAT_TEMPLATE_FILE).write_text(chat_template)


def write_config(config_file: Path, dtype: torch.dtype, *, value_head: bool) -> None:
    """Names the type of the weights, to which whoever loads them rounds, and a critic as a token classifier."""
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)  # the key's former name
    config["dtype"] = str(dtype).removeprefix("torch.")
    if value_head:
        config["architectures"] = [MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[config["model_type"]]]
        config["id2label"], config["label2id"] = {"0": "value"}, {"value": 0}
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def shard_names(num_shards: int) -> list[str]:
    """The files of a checkpoint's weights."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def write_index(directory: Path, shards: Mapping[str, Sequence[str]], *, num_bytes: int) -> None:
    """Tells which of several files holds which tensor. shards: names of tensors by file; num_bytes: of all tensors."""
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _with_score_bias(weights: NamedWeights) -> NamedWeights:
    """The value head of a critic has no bias; that of a token classifier has one, which is zero."""
    for name, tensor in weights:
        yield name, tensor
        if name == "score.weight":
            yield "score.bias", tensor.new_zeros(1)


def _write_shards(weights: NamedWeights, directory: Path) -> tuple[torch.dtype, list[str]]:
    """Returns the type of the weights, and their names."""
    shards: list[list[str]] = []
    tensors: dict[str, Tensor] = {}
    num_bytes, total_bytes = 0, 0

    def flush() -> None:
        save_file(tensors, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(tensors))
        tensors.clear()

    for name, tensor in weights:
        if tensors and num_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            num_bytes = 0
        tensors[name] = tensor.cpu().contiguous()
        num_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtype = tensor.dtype
    flush()
    files = shard_names(len(shards))
    for number, file in enumerate(files):
        (directory / f"{number}.safetensors").replace(directory / file)
    write_index(directory, dict(zip(files, shards, strict=True)), num_bytes=total_bytes)
    return dtype, [name for shard in shards for name in shard]
