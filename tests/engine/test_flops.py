"""The formula against what PyTorch counts in the forward and backward pass of real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_orz.engine import peak_flops
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.flops import attention_flops, model_flops, weights_per_token
from tests.engine import tiny


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_formula_equals_what_pytorch_counts(family: str, tmp_path: Path) -> None:
    """Eager attention multiplies all n^2 pairs; the formula counts the n (n + 1) / 2 that causality leaves."""
    num_rows, length = 3, 20
    model = AutoModelForCausalLM.from_config(tiny.config_of(family), attn_implementation="eager")
    model.save_pretrained(tmp_path)
    tokens = torch.randint(tiny.VOCAB_SIZE, (num_rows, length))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, use_cache=False).logits.logsumexp(-1).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()

    architecture = read_architecture(tmp_path)
    flops = model_flops(architecture, [length] * num_rows, num_head_tokens=num_rows * length)
    not_causal = attention_flops(architecture, num_rows * length * (length - 1) // 2)
    # transformers makes the table of rotary angles by a product of [head_dim / 2, 1] and [1, n].
    angles = forward.get_total_flops() - flops.forward - not_causal
    assert 0 <= angles <= 2 * num_rows * length * architecture.head_dim
    assert backward.get_total_flops() == 2 * (flops.forward + not_causal)
    assert flops.training == 3 * flops.forward


def test_a_token_runs_through_its_own_experts_alone(tmp_path: Path) -> None:
    """Three layers of four have six experts of 48 columns, two of them for each token; the other has a plain MLP."""
    tiny.config_of("qwen3_moe").save_pretrained(tmp_path)
    a = read_architecture(tmp_path)
    attention = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim * a.hidden_size
    experts = 2 * 3 * 48 * a.hidden_size + 6 * a.hidden_size
    assert weights_per_token(a) == 4 * attention + 3 * experts + 3 * a.ffn_size * a.hidden_size


def test_sequences_do_not_attend_to_each_other(tmp_path: Path) -> None:
    tiny.config_of("llama").save_pretrained(tmp_path)
    a = read_architecture(tmp_path)
    apart, joined = (model_flops(a, lengths, num_head_tokens=7, value_head=True) for lengths in ([5, 2], [7]))
    assert apart.layers == joined.layers
    assert joined.attention - apart.attention == attention_flops(a, 5 * 2)
    assert apart.head == 2 * a.hidden_size * 7


def test_recomputation_is_counted_apart(tmp_path: Path) -> None:
    tiny.config_of("llama").save_pretrained(tmp_path)
    flops = model_flops(read_architecture(tmp_path), [9, 4], num_head_tokens=6)
    assert flops.recomputed("none") == 0
    assert flops.recomputed("selective") == flops.attention
    assert flops.recomputed("full") == flops.layers + flops.attention


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_listed_devices_have_their_nominal_rate(name: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_flops.peak_flops.cache_clear()
    found = peak_flops.peak_flops(torch.device("cuda"), torch.bfloat16)
    peak_flops.peak_flops.cache_clear()
    assert (found.rate, found.source) == (rate, "nominal")


def test_the_rate_of_a_device_with_a_similar_name_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000")
    monkeypatch.setattr(peak_flops, "measured_flops", lambda device, dtype: 3e13)
    peak_flops.peak_flops.cache_clear()
    found = peak_flops.peak_flops(torch.device("cuda"), torch.bfloat16)
    peak_flops.peak_flops.cache_clear()
    assert (found.rate, found.source) == (3e13, "measured")


def test_the_rate_of_a_cpu_is_that_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peak_flops.MATRIX_SIZE, "cpu", 128)
    rate = peak_flops.measured_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
