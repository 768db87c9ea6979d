"""The tool that runs a server for runs elsewhere."""

from __future__ import annotations

import importlib.util
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.rollout.token import TOKEN_VARIABLE

pytest.importorskip("vllm")

TOOL = Path(__file__).parents[2] / "tools" / "serve.py"


class Replaced(BaseException):
    """This process would be another one by now."""


def serve(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, token: str | None = "a-secret"
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment the tool ends in. token: of its own environment."""
    if token is None:
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    spec = importlib.util.spec_from_file_location("serve", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve", tool)
    spec.loader.exec_module(tool)
    seen: list[Any] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        seen.extend([command, environment])
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(Replaced):
        tool.main()
    return seen[0], seen[1]


def test_the_server_is_the_one_a_run_would_start(monkeypatch: pytest.MonkeyPatch, tied_checkpoint: Path) -> None:
    options = ("--host", "10.0.0.7", "--port", "8123", "--max-model-tokens", "512", "--dtype", "float32")
    command, environment = serve(monkeypatch, str(tied_checkpoint), *options)
    pairs = dict(pairwise(command))
    expected = {"--model": str(tied_checkpoint), "--host": "10.0.0.7", "--port": "8123", "--max-model-len": "512"}
    assert {flag: pairs[flag] for flag in expected} == expected
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert "--weight-transfer-config" in command
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(
    ("token", "sentence"), [("a-secret", "holds no config.json"), (None, "ORZ_SERVER_TOKEN is not set")]
)
def test_what_cannot_be_served_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    token: str | None,
    sentence: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        serve(monkeypatch, str(tmp_path), token=token)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
