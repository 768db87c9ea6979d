from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_orz.config import FleetConfig, ModelConfig, SamplingConfig
from megatron_orz.rollout import vllm_server
from megatron_orz.rollout.fleet import open_fleet
from megatron_orz.rollout.servers import ServerError
from tests.rollout.conftest import model_config

SAMPLING = SamplingConfig(max_response_tokens=8)


def start(model: ModelConfig, run_dir: Path, **fleet: float) -> None:
    config = FleetConfig(kind="vllm", max_model_tokens=512, **fleet)  # type: ignore[arg-type]
    with open_fleet(config, SAMPLING, model, run_dir=run_dir):
        pytest.fail("the server started")


def use_command(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    def command(*args: object, **kwargs: object) -> Sequence[str]:
        return [sys.executable, "-c", program]

    monkeypatch.setattr(vllm_server, "_command", command)


def test_a_missing_vllm_is_said_with_the_remedy(
    tied_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm is not installed; .* use --fleet\.kind local"):
        start(model_config(tied_checkpoint), tmp_path)


def test_a_directory_without_a_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json; policy\.path must be"):
        start(model_config(tmp_path), tmp_path)


def test_more_tokens_than_the_model_has_positions_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    with pytest.raises(ValueError, match=r"fleet\.max_model_tokens 512 exceeds the 256 positions .* lower it to 256"):
        start(model_config(tmp_path), tmp_path)


def test_a_head_size_without_a_kernel_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 96, "num_attention_heads": 4}))
    with pytest.raises(ValueError, match=r"has head_dim 24; vLLM's CPU kernels have .* use --fleet\.kind local"):
        start(model_config(tmp_path), tmp_path)


def test_an_early_end_is_seen_at_once_with_its_reason(
    tied_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_command(monkeypatch, "raise RuntimeError('no weights here')")
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"ended with exit code 1 during its start; see (?s:.*)no weights here"):
        start(model_config(tied_checkpoint), tmp_path, start_timeout_s=500.0)
    assert time.monotonic() - started < 250


def test_a_slow_start_ends_at_its_deadline(
    tied_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_command(monkeypatch, "import time; time.sleep(600)")
    with pytest.raises(ServerError, match=r"did not answer within fleet\.start_timeout_s = 0\.7 s"):
        start(model_config(tied_checkpoint), tmp_path, start_timeout_s=0.7)


def test_a_wait_reports_its_progress(tied_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_told = tmp_path / "told"
    use_command(monkeypatch, f"import os, time\nwhile not os.path.exists({str(is_told)!r}): time.sleep(0.01)")
    waits: list[float] = []

    def on_wait(elapsed_s: float) -> None:
        waits.append(elapsed_s)
        if len(waits) == 3:
            is_told.touch()

    config = FleetConfig(max_model_tokens=512)
    with (
        pytest.raises(ServerError, match="ended with exit code 0"),
        open_fleet(config, SAMPLING, model_config(tied_checkpoint), run_dir=tmp_path, on_wait=on_wait),
    ):
        pass
    assert waits == sorted(waits)
    assert waits[0] < waits[2]


def test_the_server_does_not_inherit_the_trainers_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KEPT", "kept")
    environment = vllm_server._environment(on_cuda=False, cpu_threads=None)
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "VLLM_CPU_KVCACHE_SPACE"} & environment.keys()
    assert environment["KEPT"] == "kept"
    assert environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # its own store would be looked for elsewhere
    environment = vllm_server._environment(on_cuda=False, cpu_threads=None)
    assert "OMP_NUM_THREADS" not in environment
    assert not any(name.startswith("TORCHELASTIC") for name in environment)


def test_a_server_decodes_as_many_responses_together_as_configured(tmp_path: Path) -> None:
    def flags(fleet: FleetConfig) -> list[str]:
        return vllm_server._command(model_config(tmp_path), fleet, host="127.0.0.1", port=1, on_cuda=False)

    assert "--max-num-seqs" not in flags(FleetConfig()), "the server's own default"
    command = flags(FleetConfig(max_running=16))
    assert command[command.index("--max-num-seqs") + 1] == "16"
    with pytest.raises(ValueError, match="max_running 0"):
        FleetConfig(max_running=0)


def test_a_server_on_the_cpu_runs_as_many_threads_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert vllm_server._environment(on_cuda=False, cpu_threads=1)["OMP_NUM_THREADS"] == "1"
    assert vllm_server._environment(on_cuda=False, cpu_threads=None)["OMP_NUM_THREADS"] == "7"
