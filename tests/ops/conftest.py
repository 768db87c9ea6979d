"""Runs a test of an op on every device, and by kernel and reference."""

import pytest
import torch

from megatron_orz.ops import extension


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A test that takes this runs on the CPU, and with `-m gpu` on CUDA."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=["kernel", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with and without the extension."""
    if request.param == "kernel" and extension.NOT_BUILT is not None:
        pytest.skip("the C++ extension is not built")
    if request.param == "reference":
        monkeypatch.setattr(extension, "has_kernel", lambda *_: False)
