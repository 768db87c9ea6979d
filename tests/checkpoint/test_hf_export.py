"""Checkpoints that transformers loads bit by bit, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from megatron_orz.checkpoint import hf_export
from megatron_orz.checkpoint.hf_export import export_hf
from tests.engine import tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "source", tied=True)
    (tmp_path / "source" / "tokenizer.json").write_text("a tokenizer")
    return tmp_path / "source"


def trained(source: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The source's model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As the engine exports them: a tied weight comes once."""
    yield from model.named_parameters()


def assert_loads_as(path: Path, model: PreTrainedModel) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == model.dtype
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_transformers_loads_the_very_weights(source: Path, tmp_path: Path) -> None:
    model = trained(source)
    export_hf(weights_of(model), source=source, target=tmp_path / "final", is_writer=True)
    assert_loads_as(tmp_path / "final", model)
    assert (tmp_path / "final" / "tokenizer.json").read_text() == "a tokenizer"
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("old_key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("trained_in", "named"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_no_weight_is_rounded_to_the_type_of_the_source(
    source: Path, tmp_path: Path, trained_in: torch.dtype, named: str, old_key: str
) -> None:
    config_file = source / "config.json"
    config = json.loads(config_file.read_text())
    del config["dtype"]
    config_file.write_text(json.dumps(config | {old_key: named}))
    model = trained(source, trained_in)
    export_hf(weights_of(model), source=source, target=tmp_path / "final", is_writer=True)
    assert_loads_as(tmp_path / "final", model)


def test_a_critic_becomes_a_token_classifier(source: Path, tmp_path: Path) -> None:
    body = trained(source).model
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(4))
    weights = [(f"model.{name}", weight) for name, weight in body.named_parameters()] + [("score.weight", head)]
    export_hf(iter(weights), source=source, target=tmp_path / "critic", is_writer=True)
    ids = torch.arange(20)[None]
    expected = body(ids).last_hidden_state @ head.t()
    as_token_classifier = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic").eval()
    assert as_token_classifier.config.architectures == ["Qwen2ForTokenClassification"]
    assert torch.allclose(as_token_classifier(ids).logits, expected, atol=1e-6)
    as_reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    assert torch.allclose(as_reward_model(ids).logits[0], expected[0, -1], atol=1e-6)


def test_large_checkpoints_are_split_into_indexed_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 100_000
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", limit)
    model, target = trained(source), tmp_path / "final"
    export_hf(weights_of(model), source=source, target=target, is_writer=True)
    assert_loads_as(target, model)

    index = json.loads((target / "model.safetensors.index.json").read_text())
    sizes = {name: weight.nbytes for name, weight in model.named_parameters()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    filled = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names = file.keys()
        assert {index["weight_map"][name] for name in names} == {shard.name}
        filled.append(sum(sizes[name] for name in names))
    assert max(filled) <= limit
    assert all(one + next_one > limit for one, next_one in pairwise(filled)), "a shard ends before it is full"


def test_weights_of_the_source_are_left_out_in_every_format(source: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.gguf", "model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (source / name).write_text("old weights")
    (source / "model-00001-of-00002.safetensors").write_text("old weights")
    (source / "tokenizer.model").write_text("sentencepiece")
    (source / "chat_template.jinja").write_text("template")
    (source / "original").mkdir()
    export_hf(weights_of(trained(source)), source=source, target=tmp_path / "final", is_writer=True)
    assert files(tmp_path / "final").keys() == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    }


def test_a_checkpoint_replaces_what_the_target_held(source: Path, tmp_path: Path) -> None:
    target, model = tmp_path / "final", trained(source)
    target.mkdir()
    (target / "model-00001-of-00002.safetensors").write_text("of an earlier run")
    export_hf(weights_of(model), source=source, target=target, is_writer=True)
    assert_loads_as(target, model)
    assert not (target / "model-00001-of-00002.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "final"}


@pytest.mark.parametrize("held", [None, "an earlier checkpoint"])
def test_an_error_in_the_midst_leaves_the_target_as_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str | None
) -> None:
    """The disk is full at the second shard."""
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", 100_000)
    save_file, target = hf_export.save_file, tmp_path / "final"

    def save_one_file(tensors: dict[str, Tensor], path: Path, **options: object) -> None:
        if path.name != "0.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(hf_export, "save_file", save_one_file)
    if held:
        target.mkdir()
        (target / "config.json").write_text(held)
    before = files(tmp_path)
    weights = weights_of(trained(source))
    with pytest.raises(RuntimeError, match=r"cannot write the checkpoint \S+final: .*No space left.*; free some space"):
        export_hf(weights, source=source, target=target, is_writer=True)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source"} | ({"final"} if held else set())
    assert next(weights, None) is None, "the other ranks wait for this one to take its part in every weight"


def test_a_target_that_cannot_be_made_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    weights = weights_of(trained(source))
    with pytest.raises(RuntimeError, match=r"cannot write the checkpoint \S+file/final: .*; free some space"):
        export_hf(weights, source=source, target=tmp_path / "file" / "final", is_writer=True)
    assert next(weights, None) is None


def test_a_rank_that_does_not_write_takes_part_and_leaves_the_disk_alone(source: Path, tmp_path: Path) -> None:
    weights = weights_of(trained(source))
    export_hf(weights, source=source, target=tmp_path / "final", is_writer=False)
    assert next(weights, None) is None
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
