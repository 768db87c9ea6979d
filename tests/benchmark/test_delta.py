from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from megatron_orz.benchmark.delta import Arguments, run


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_consecutive_checkpoints_are_compared(tmp_path: Path) -> None:
    """At one, bfloat16 has steps of 2^-7: it rounds less than half of that away."""
    ones, still = torch.ones(30, 100), torch.ones(10)
    moved = ones.clone()
    moved[0] += 2**-9  # is lost in bfloat16
    moved[1:3] += 2**-7
    paths = [
        save(tmp_path / "0", matrix=ones, norm=still),
        save(tmp_path / "1", matrix=moved, norm=still),
        save(tmp_path / "2", matrix=2 * moved, norm=still),
    ]
    written = io.StringIO()
    first, second = run(Arguments(tuple(paths)), Console(file=written, width=140))
    assert (first.num_elements, first.num_changed, first.num_changed_16) == (3010, 300, 200)
    assert (first.num_tensors, first.num_changed_tensors) == (2, 1)
    assert first.sizes["changes"] == 3 * (200 + 10)  # every 256th, one of which has changed
    assert 0 < first.sizes["xor, zstd"] < first.sizes["xor, lz4"] < 3 * 200
    assert (second.num_changed_16, second.sizes["changes"]) == (3000, 2 * 3000)  # a changed matrix travels whole
    assert "9.97%" in written.getvalue()
    assert "6.64%" in written.getvalue()


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 1 checkpoints; name at least two"):
        Arguments((tmp_path,))
    one, other = save(tmp_path / "a", x=torch.ones(3)), save(tmp_path / "b", x=torch.ones(4))
    with pytest.raises(ValueError, match=r"x has shape \[3\]"):
        run(Arguments((one, other)), Console(file=io.StringIO()))
