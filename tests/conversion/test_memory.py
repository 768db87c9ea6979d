"""Converting needs little memory, however large the model is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.measure import GIB, SHAPES, convert, write_random_model


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A process that has imported torch and transformers holds about 0.4 GiB; the largest tensor is 0.25 GiB."""
    num_bytes = write_random_model(tmp_path / "hf", "qwen2.5-0.5b")
    hidden, *_, vocab = SHAPES["qwen2.5-0.5b"]
    bound = 0.4 * GIB + vocab * hidden * 2
    assert bound < num_bytes, "the whole model would fit"
    for direction, source, target in (("to_megatron", "hf", "megatron"), ("to_hf", "megatron", "again")):
        peak, _ = convert(direction, tmp_path / source, tmp_path / target)
        assert 0.05 * GIB < peak < bound, f"{direction}: {peak / GIB:.2f} GiB"
