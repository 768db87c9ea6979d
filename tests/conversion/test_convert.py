"""Hugging Face -> Megatron -> Hugging Face is the identity, bit by bit, and each form is what its readers expect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_orz.conversion import convert, torch_dist_file
from megatron_orz.conversion.convert import plan_hf_to_megatron, plan_megatron_to_hf
from tests.conversion.checkpoints import (
    COMPANIONS,
    assert_same_tensors,
    content_of,
    run,
    save_critic,
    save_policy,
    tensors_of,
)
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("save", [save_policy, save_critic], ids=["policy", "critic"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_round_trip_is_bitwise(tmp_path: Path, family: str, save: Callable[[Path, str], Path]) -> None:
    source = save(tmp_path / "hf", family)
    assert run(plan_hf_to_megatron(source, tmp_path / "megatron"))
    assert run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again"))
    assert_same_tensors(source, tmp_path / "again")
    for name in COMPANIONS:
        for directory in ("megatron", "again"):
            assert (tmp_path / directory / name).read_text() == content_of(name)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "again"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_small_chunks_files_and_shards_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    source = save_policy(tmp_path / "hf", family)
    monkeypatch.setattr(torch_dist_file, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(convert, "TORCH_DIST_FILE_BYTES", 50_000)
    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 100_000)
    run(plan_hf_to_megatron(source, tmp_path / "megatron"))
    run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again"))
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 5
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert_same_tensors(source, tmp_path / "again")
    tensors = tensors_of(source)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "again"))
    ids = torch.arange(20)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("step", ["to_megatron", "to_hf"])
def test_dtype_converts_every_tensor(tmp_path: Path, step: str) -> None:
    source = save_policy(tmp_path / "hf", "qwen2")
    to_megatron, to_hf = (torch.bfloat16, None) if step == "to_megatron" else (None, torch.bfloat16)
    run(plan_hf_to_megatron(source, tmp_path / "megatron", dtype=to_megatron))
    run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again", dtype=to_hf))
    found = tensors_of(tmp_path / "again")
    for name, tensor in tensors_of(source).items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def test_types_of_tensors_are_kept(tmp_path: Path) -> None:
    """Some checkpoints keep routers in float32 and the rest in bfloat16."""
    from safetensors.torch import save_file

    source = save_policy(tmp_path / "hf", "qwen3_moe")
    mixed = {name: x if ".gate.weight" in name else x.bfloat16() for name, x in tensors_of(source).items()}
    save_file(mixed, source / "model.safetensors")
    run(plan_hf_to_megatron(source, tmp_path / "megatron"))
    run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again"))
    assert_same_tensors(source, tmp_path / "again")


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_transformers_reads_the_values_of_a_critic(tmp_path: Path, family: str) -> None:
    source = save_critic(tmp_path / "hf", family)
    run(plan_hf_to_megatron(source, tmp_path / "megatron"))
    run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again"))
    ids = torch.arange(20)[None]
    first, second = (
        AutoModelForTokenClassification.from_pretrained(tmp_path / name).eval() for name in ("hf", "again")
    )
    assert second.config.num_labels == 1
    assert first(ids).logits.shape == (1, 20, 1)
    assert torch.equal(first(ids).logits, second(ids).logits)
    architectures = json.loads((tmp_path / "again" / "config.json").read_text())["architectures"]
    assert architectures == [type(first).__name__]


def test_a_value_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    source = save_critic(tmp_path / "hf", "qwen2")
    model = AutoModelForTokenClassification.from_pretrained(source)
    torch.nn.init.ones_(model.score.bias)
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"score\.bias is not zero"):
        plan_hf_to_megatron(source, tmp_path / "megatron")


def test_companions_may_lie_elsewhere(tmp_path: Path) -> None:
    source = save_policy(tmp_path / "hf", "qwen2")
    run(plan_hf_to_megatron(source, tmp_path / "megatron"))
    (tmp_path / "megatron" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again")
    run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again", companions=source))
    assert_same_tensors(source, tmp_path / "again")
    (source / "config.json").touch()
    with pytest.raises(ValueError, match="again exists and is not this output"):
        run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "again", companions=source))
