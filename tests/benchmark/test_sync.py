from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_orz.benchmark import sync, workload
from megatron_orz.benchmark.sync import Arguments

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def test_every_transport_is_timed_beside_memcpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workload.MODELS, "smollm2", workload.MODELS["smollm2"] | TINY)
    written = io.StringIO()
    output = sync.run(
        Arguments(
            repeats=2, wire_dtype="bfloat16", delta=True, num_stages=2, device="cpu", output=tmp_path / "sync.json"
        ),
        Console(file=written, width=140),
    )
    results = json.loads(output.read_text())
    (model,) = results["models"]
    networks = {"gloo", "gloo, delta", "disk", "disk, delta"}
    transports = {"ipc", *networks, *(f"{name}, 2 stages" for name in networks)}
    assert set(model["times_s"]) == {"memcpy", "disk write and read", "loopback TCP", *transports}
    assert set(model["sent_bytes"]) == transports
    whole, changes = model["num_bytes"] / 2, model["sent_bytes"]["gloo, delta"]
    assert model["sent_bytes"]["gloo"] == model["sent_bytes"]["disk, 2 stages"] == whole
    assert 0.005 * whole < changes == model["sent_bytes"]["disk, delta"] < 0.1 * whole
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in model["times_s"].values())
    assert "target, at least 60% of memcpy" in written.getvalue()
    assert {"load_average", "load_average_after", "environment"} <= results.keys()


def test_an_output_weight_is_sent_unless_it_is_the_embedding() -> None:
    tied, untied = (dict(sync.make_weights(model, torch.float32, torch.device("meta"))) for model in ("0.5b", "7b"))
    assert sum(weight.numel() for weight in tied.values()) == 494_032_768
    assert "lm_head.weight" not in tied
    assert untied["lm_head.weight"].shape == (152064, 3584)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"num_servers": 0}, "num_servers is 0"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"transport": ("auto",)}, "transport has auto"),
        ({"transport": ("nccl",)}, "there is no GPU"),
        ({"delta": True}, "set --dtype float32 --wire-dtype bfloat16"),
    ],
)
def test_what_cannot_be_timed_is_refused(wrong: dict[str, object], message: str) -> None:
    if "nccl" in wrong.get("transport", ()) and torch.cuda.is_available():  # type: ignore[operator]
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        Arguments(**wrong)  # type: ignore[arg-type]


def test_stages_that_would_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="num_stages is 2, and the stages here are threads of one process"):
        Arguments(num_stages=2, device="cuda")
