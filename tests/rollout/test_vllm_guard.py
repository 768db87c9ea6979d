"""The guard of a server's endpoints, alone and in front of a real vLLM server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.rollout.fleet import open_fleet
from megatron_orz.rollout.token import TOKEN_VARIABLE, authorization, server_token
from megatron_orz.rollout.vllm_guard import Guard
from tests.rollout.conftest import make_prompts, model_config, named_weights, tiny_model

SECRET = "a-secret"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    return Guard(answer)


def status(guard: Guard, path: str, headers: dict[str, str] | list[tuple[str, str]] | None = None) -> int:
    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://server") as http:
            return (await http.post(path, headers=headers)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {SECRET[:-1]}"},
        {"Authorization": f"Bearer {SECRET} "[:-1] + "x"},
        {"Authorization": SECRET},
        {"Authorization": f"Basic {SECRET}"},
        [("Authorization", f"Bearer {SECRET}"), ("Authorization", "Bearer other")],
        {"X-Authorization": f"Bearer {SECRET}"},
    ],
)
def test_requests_without_the_token_are_refused(guard: Guard, headers: Any) -> None:
    for path in (
        "/update_weights",
        "/collective_rpc",
        "/v1/completions",
        "/pause",
        "//health",
        "/health/..",
        "/metrics",
    ):
        assert status(guard, path, headers) == 401


def test_the_token_and_the_health_check_pass(guard: Guard) -> None:
    assert status(guard, "/update_weights", {"Authorization": f"Bearer {SECRET}"}) == 200
    assert status(guard, "/health") == 200


def test_a_server_without_a_token_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(KeyError):
        Guard(lambda scope, receive, send: asyncio.sleep(0))


@pytest.mark.slow
def test_a_real_server_answers_its_run_alone_and_listens_on_loopback(untied_checkpoint: Path, tmp_path: Path) -> None:
    fleet = FleetConfig(max_model_tokens=128, kv_cache_gib=0.1, cpu_threads=1)
    sampling = SamplingConfig(max_response_tokens=4)
    before = set(psutil.Process().children(recursive=True))
    with open_fleet(fleet, sampling, model_config(untied_checkpoint), run_dir=tmp_path) as opened:
        opened.update_weights(named_weights(tiny_model(tied=False, seed=1)), version=0)
        assert len(opened.generate(make_prompts(2), num_responses=1, seed=0)) == 2

        processes = [process for process in psutil.Process().children(recursive=True) if process not in before]
        assert processes
        listening = [
            connection.laddr
            for process in [psutil.Process(), *processes]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        print("listening:", sorted({(address.ip, address.port) for address in listening}))
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert not any(server_token() in argument for process in processes for argument in process.cmdline())

        [port] = {address.port for address in listening if _answers(f"http://127.0.0.1:{address.port}/health")}
        url = f"http://127.0.0.1:{port}"
        for path in (
            "/v1/completions",
            "/pause",
            "/update_weights",
            "/collective_rpc",
            "/reset_prefix_cache",
            "/resume",
        ):
            assert httpx.post(url + path, json={}, timeout=10).status_code == 401, path
        for path in ("/weight_info", "/v1/models", "/metrics", "/docs", "/openapi.json"):
            assert httpx.get(url + path, timeout=10).status_code == 401, path
        assert httpx.get(url + "/v1/models", headers=authorization(), timeout=10).status_code == 200
    assert server_token() not in (tmp_path / "vllm.log").read_text()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
