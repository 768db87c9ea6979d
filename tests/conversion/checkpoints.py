"""Tiny checkpoints to convert, and how to compare them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForTokenClassification

from megatron_orz.conversion.convert import Conversion
from tests.engine import tiny

TIED = ("llama3", "qwen3")


def save_policy(path: Path, family: str) -> Path:
    tiny.save_model(path, family=family, tied=family in TIED)
    return add_tokenizer(path)


def save_critic(path: Path, family: str, *, vocab_size: int = tiny.VOCAB_SIZE) -> Path:
    """As transformers saves a reward model that gives every token a value."""
    torch.manual_seed(3)
    config = tiny.config_of(family, vocab_size=vocab_size)
    config.num_labels = 1
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    torch.nn.init.zeros_(model.score.bias)
    model.save_pretrained(path)
    return add_tokenizer(path)


COMPANIONS = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json")


def content_of(name: str) -> str:
    return json.dumps({"transformers_version": name})


def add_tokenizer(path: Path) -> Path:
    for name in COMPANIONS:
        (path / name).write_text(content_of(name))
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(first: Path, second: Path) -> None:
    """Bit by bit."""
    expected, found = tensors_of(first), tensors_of(second)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def run(conversion: Conversion) -> bool:
    """Runs it; every byte has to be reported once."""
    done = []
    is_new = conversion.run(done.append)
    assert not is_new or sum(done) == conversion.num_bytes
    return is_new
