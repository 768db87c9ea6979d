"""Weight gradients that go straight into `main_grad`."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_orz.engine import gradient_accumulation
from megatron_orz.engine.gradient_accumulation import _WeightGradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 33])
def test_the_gradient_is_added_in_float32(device: str, dtype: torch.dtype, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, grad_outputs = (torch.randn(num_tokens, n, generator=generator).to(device, dtype) for n in (16, 24))
    before = torch.randn(24, 16, generator=generator).to(device)
    expected = before.double() + grad_outputs.double().t() @ inputs.double()
    main_grad = before.clone()
    _WeightGradients.wgrad_gemm_accum_fp32(inputs, grad_outputs, main_grad)
    # Only the CPU rounds the product of half precision before it is added.
    tolerance = 0.05 if (device, dtype) == ("cpu", torch.bfloat16) else 1e-4
    torch.testing.assert_close(main_grad.double(), expected, atol=tolerance, rtol=0)
    assert num_tokens or torch.equal(main_grad, before)


def test_the_gradient_is_added_in_the_type_of_the_weights() -> None:
    inputs, grad_outputs = torch.ones(5, 3, dtype=torch.bfloat16), torch.full((5, 2), 2.0, dtype=torch.bfloat16)
    main_grad = torch.ones(2, 3, dtype=torch.bfloat16)
    _WeightGradients.wgrad_gemm_accum_fp16(inputs, grad_outputs, main_grad)
    assert torch.equal(main_grad, torch.full((2, 3), 11.0, dtype=torch.bfloat16))


def test_an_extension_that_is_installed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = object()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    gradient_accumulation.install()
    assert layers.fused_weight_gradient_mlp_cuda is apex
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    gradient_accumulation.install()
    assert layers.fused_weight_gradient_mlp_cuda is _WeightGradients
