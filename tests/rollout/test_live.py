"""A server that is already there: its answers, and what is said where they are not vLLM's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.rollout.fleet import open_fleet
from megatron_orz.rollout.live import LiveServer
from megatron_orz.rollout.servers import ServerError, free_port
from tests.rollout.conftest import character_tokenizer, make_prompts, model_config, tiny_model

SAMPLING = SamplingConfig(max_response_tokens=12, temperature=0.7, top_p=0.9)
Answer = Callable[[str, dict[str, Any] | None], tuple[int, Any]]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server whose answer to (path, body) is a status and JSON: it stands in for servers with faults."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*answer(self.path, None))

        def do_POST(self) -> None:
            self._send(*answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, status: int, value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def choice(index: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "index": index,
        "token_ids": [index, 7],
        "logprobs": {"token_logprobs": [-1.0, -0.5]},
        "finish_reason": "stop",
    }
    return {**fields, **changes}


class Server:
    """A vLLM server that serves the model `somebody`, and remembers what it was asked."""

    def __init__(self, choices: Any = None, versions: list[str] | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._choices = [choice(1), choice(0)] if choices is None else choices
        self._versions = iter(versions or [])

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "somebody"}]}
        if path == "/weight_info":
            version = next(self._versions, None)
            return (404, {}) if version is None else (200, {"weight_version": version})
        assert body is not None
        self.bodies.append(body)
        return 200, {"id": f"cmpl-{body['request_id']}", "choices": self._choices}


def test_prompts_go_in_as_tokens_and_siblings_come_back_in_order() -> None:
    server = Server(versions=["12", "12"])
    advanced: list[int] = []
    prompts = make_prompts(3)
    with serving(server.answer) as url:
        with LiveServer(url + "/", SAMPLING, request_timeout_s=20.0) as live:
            rollouts = live.generate(prompts, num_responses=2, seed=5, on_rollout=lambda: advanced.append(1))
            client = live._client._http
        assert client.is_closed
    assert [rollout.response_ids for rollout in rollouts] == [[0, 7], [1, 7]] * 3
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(2)]
    assert {rollout.policy_version for rollout in rollouts} == {12}
    assert len(advanced) == 6
    assert {tuple(body["prompt"]) for body in server.bodies} == {tuple(prompt.token_ids) for prompt in prompts}
    assert len({body["seed"] for body in server.bodies}) == 3
    (settings,) = {
        (body["model"], body["n"], body["temperature"], body["top_p"], body["max_tokens"]) for body in server.bodies
    }
    assert settings == ("somebody", 2, 0.7, 0.9, 12)


def test_new_weights_meanwhile_are_an_error() -> None:
    with (
        serving(Server(versions=["3", "4"]).answer) as url,
        pytest.raises(ServerError, match="version 3 to 4 during"),
    ):
        LiveServer(url, SAMPLING, request_timeout_s=20.0).generate(make_prompts(1), num_responses=2, seed=0)


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ([choice(0)], "with 1 responses, not 2"),
        ([choice(0), {"index": 1, "text": "hello", "finish_reason": "stop"}], "something else than responses"),
        ([choice(0), choice(1, finish_reason="tool_calls")], "something else than responses"),
        ([choice(0), choice(1, logprobs=None)], "something else than responses"),
        ("none", "something else than responses"),
    ],
)
def test_answers_of_another_kind_are_named(choices: Any, sentence: str) -> None:
    with serving(Server(choices).answer) as url, pytest.raises(ServerError, match=sentence):
        LiveServer(url, SAMPLING, request_timeout_s=20.0).generate(make_prompts(1), num_responses=2, seed=0)


@pytest.mark.parametrize(
    ("status", "value", "sentence"),
    [
        (500, {"error": "out of memory"}, "answered 500: .*out of memory"),
        (200, b"<html>", "something else than JSON"),
        (200, [], "no JSON object"),
        (200, {"data": []}, "serves no model"),
        (404, {}, "serves no model"),
        (401, b"this server answers its own run alone", "with the same ORZ_SERVER_TOKEN in the environment"),
    ],
)
def test_what_is_no_server_of_models_is_named(status: int, value: Any, sentence: str) -> None:
    with serving(lambda path, body: (status, value)) as url, pytest.raises(ServerError, match=sentence):
        LiveServer(url, SAMPLING, request_timeout_s=20.0)


def test_an_address_where_nobody_is() -> None:
    for url in ("http://127.0.0.1:9", "127.0.0.1:9", "nonsense"):
        with pytest.raises(ServerError, match="cannot be reached"):
            LiveServer(url, SAMPLING, request_timeout_s=5.0)


def test_a_server_that_says_nothing_ends_at_the_deadline() -> None:
    release = threading.Event()

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None:
            release.wait(120)
        return Server().answer(path, body)

    with serving(answer) as url:
        live = LiveServer(url, SAMPLING, request_timeout_s=0.5)
        with pytest.raises(ServerError, match=r"took longer than 0\.5 s"):
            live.generate(make_prompts(1), num_responses=2, seed=0)
        release.set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_server_of_a_run_answers_as_it_answers_the_run(tmp_path: Path) -> None:
    checkpoint, prompts = tmp_path / "model", make_prompts(6)
    tiny_model(tied=False, seed=1).save_pretrained(checkpoint)
    character_tokenizer().save_pretrained(checkpoint)
    port = free_port()
    fleet = FleetConfig(kind="vllm", port=port, max_model_tokens=64, kv_cache_gib=0.1, cpu_threads=1)
    with open_fleet(fleet, SAMPLING, model_config(checkpoint), run_dir=tmp_path) as running:
        live = LiveServer(f"http://127.0.0.1:{port}", SAMPLING, request_timeout_s=300.0)
        assert live.weight_version() is not None
        asked = live.generate(prompts, num_responses=3, seed=9)
        expected = running.generate(prompts, num_responses=3, seed=9)
    # Batches differ, and with them the last bits of the logits: a few draws may fall to the other side.
    same = sum(ours.response_ids == theirs.response_ids for ours, theirs in zip(asked, expected, strict=True))
    assert same >= len(expected) - 2
    assert {rollout.policy_version for rollout in asked} == {rollout.policy_version for rollout in expected}
