"""tools/convert.py as a user meets it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_orz.command_line import INTERRUPTED
from megatron_orz.conversion.convert import Conversion
from megatron_orz.data.synthetic import build_tokenizer
from tests.conversion.checkpoints import assert_same_tensors, save_critic, tensors_of
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["tools/convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path("tools/convert.py", run_name="__main__")
    return exit_.value.code


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with the tokenizer of the demo."""
    tokenizer = build_tokenizer()
    tiny.save_model(tmp_path / "hf", family="qwen2", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_there_and_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert convert(monkeypatch, "hf-to-megatron", "--input", source, "--output", megatron) == 0
    assert capsys.readouterr().out == f"{megatron}\n"
    assert convert(monkeypatch, "hf-to-megatron", "--input", source, "--output", megatron) == 0
    assert capsys.readouterr().out == f"{megatron} is complete already\n"
    assert convert(monkeypatch, "megatron-to-hf", "--input", megatron, "--output", again) == 0
    assert_same_tensors(source, again)


def test_inspect_lists_both_forms(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(monkeypatch, "hf-to-megatron", "--input", source, "--output", tmp_path / "megatron", "--dtype", "bfloat16")
    capsys.readouterr()
    totals = []
    for form, name, dtype in (
        ("hf", "model.layers.3.self_attn.q_proj.weight", "float32"),
        ("megatron", "decoder.layers.3.self_attention.linear_qkv.weight", "bfloat16"),
    ):
        assert convert(monkeypatch, "inspect", "--input", tmp_path / form) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert dtype in line
        assert line.endswith("[64, 64]" if form == "hf" else "[128, 64]")
        totals.append(lines[-1])
    num_elements = sum(tensor.numel() for tensor in tensors_of(source).values())
    assert f"{4 * num_elements:,} bytes" in totals[0]
    assert f"{2 * num_elements:,} bytes" in totals[1]


def test_verify_tells_equal_models_from_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, changed = tmp_path / "megatron", tmp_path / "changed"
    convert(monkeypatch, "hf-to-megatron", "--input", source, "--output", megatron)
    convert(monkeypatch, "megatron-to-hf", "--input", megatron, "--output", changed)
    tensors = tensors_of(changed)
    tensors["model.layers.2.self_attn.v_proj.weight"][5] += 0.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})

    text = ("--text", "3 + 4 = 7")
    capsys.readouterr()
    assert convert(monkeypatch, "verify", "--first", source, "--second", megatron, *text) == 0
    assert difference(capsys) < 1e-5
    assert convert(monkeypatch, "verify", "--first", source, "--second", changed, *text) == 1
    ids = torch.tensor([token_ids(source, "3 + 4 = 7")])
    first, second = (AutoModelForCausalLM.from_pretrained(path)(ids).logits.detach() for path in (source, changed))
    assert difference(capsys) == pytest.approx(float((first - second).abs().max()), rel=1e-2)


def test_verify_compares_the_values_of_critics(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer()
    critic = save_critic(tmp_path / "critic", "qwen2", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(critic)
    convert(monkeypatch, "hf-to-megatron", "--input", critic, "--output", tmp_path / "megatron")
    capsys.readouterr()
    text = ("--text", "3 + 4 = 7")
    assert convert(monkeypatch, "verify", "--first", critic, "--second", tmp_path / "megatron", *text) == 0
    assert difference(capsys) < 1e-5
    assert convert(monkeypatch, "verify", "--first", critic, "--second", source, *text) == 2
    assert "name two checkpoints of the same model" in capsys.readouterr().err


def test_an_interrupt_has_its_own_exit_code_and_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "run", interrupt)
        assert convert(patch, "hf-to-megatron", "--input", source, "--output", tmp_path / "out") == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-2:] == ["the same command goes on from here", "interrupted"]


def test_an_error_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(monkeypatch, "hf-to-megatron", "--input", tmp_path / "none", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'none'} holds no config.json")
    assert error.count("\n") == 1


def difference(capsys: pytest.CaptureFixture[str]) -> float:
    words = capsys.readouterr().out.split()
    assert words[:2] == ["largest", "difference"]
    return float(words[2])


def token_ids(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(path)(text)["input_ids"]
    return ids
