"""The roofline: its roofs and points from figures that were made up by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.source import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "roofline.py"))


def figures() -> dict[str, Any]:
    """A machine of 100 FLOP/s and 10 byte/s: T=2, H=3, V=5 in float32."""
    return {
        "environment": {"device": "abacus"},
        "groups": [
            {
                "task": "token-loss",
                "shape": "tiny: T=2 H=3 V=5, float32",
                "floor_s": 3 * 60 / 100,  # three products of 2 T H V = 60 FLOP
                "floor": {"matmul logits": 1, "matmul d_hidden": 1, "matmul d_weight": 1},
                "rows": {"megatron_orz": {"min_s": 2.0}, "other": {"min_s": None}},
            },
            {
                "task": "value-loss",
                "shape": "tiny: T=2 H=3, float32",
                "floor_s": 48 / 10,  # T H floats, read and written
                "floor": {"copy hidden": 1},
                "rows": {"megatron_orz": {"min_s": 8.0}},
            },
        ],
    }


def test_roofs_and_points_follow_from_the_figures(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(json.dumps(figures()))
    roofline = TOOL["read_roofline"](tmp_path / "kernels.json")
    assert (roofline.peak_flops, roofline.bandwidth) == (pytest.approx(100), pytest.approx(10))
    loss, value = roofline.works
    assert loss.flops == 180
    assert loss.num_bytes == 2 * 4 * (2 * 3 + 5 * 3)
    assert loss.seconds == {"megatron_orz": 2.0}, "what was not measured is no point"
    assert (value.flops, value.num_bytes) == (36, 48)
    assert roofline.roof(0.5) == pytest.approx(5)
    assert roofline.roof(1000) == pytest.approx(100)
    TOOL["draw"](roofline, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_every_implementation_is_drawn_however_many_there_are(tmp_path: Path) -> None:
    made = figures()
    names = [f"implementation {number}" for number in range(12)]
    made["groups"][0]["rows"] = {name: {"min_s": 2.0} for name in names}
    (tmp_path / "kernels.json").write_text(json.dumps(made))
    TOOL["draw"](TOOL["read_roofline"](tmp_path / "kernels.json"), tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    assert [name for name in names if f"<!-- {name} -->" not in drawn] == []


def test_figures_without_a_floor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(figures() | {"groups": figures()["groups"][:1]}))
    with pytest.raises(ValueError, match=r"lacks a floor; measure token-loss and value-loss"):
        TOOL["read_roofline"](path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"holds no figures of kernels .*; run tools/benchmark\.py kernels"):
        TOOL["read_roofline"](path)


def test_the_figures_in_the_repository_lie_below_their_roofs() -> None:
    """But for the few per cent by which two timings of the same product differ."""
    roofline = TOOL["read_roofline"](ROOT / "bench" / "results" / "amd-epyc-2-threads-kernels.json")
    shares = {
        work.task: work.flops / work.seconds["megatron_orz"] / roofline.roof(work.intensity) for work in roofline.works
    }
    assert set(shares) == {"log-prob", "log-prob-gradient", "token-loss", "value-loss"}
    assert max(shares.values()) < 1.1
    assert shares["log-prob"] > 0.7
