"""The client against a server that misbehaves on demand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.vllm_client import VLLMClient
from tests.rollout.conftest import make_prompts

SAMPLING = SamplingConfig(max_response_tokens=8, temperature=0.5, stop=("end",))


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = "3"
        self.requests: list[dict[str, Any]] = []
        self.edit: Callable[[dict[str, Any]], None] = lambda choice: None
        """Spoils each choice of an answer."""
        self.before_answer: Callable[[], None] = lambda: None


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"weight_version": self.server.version})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.before_answer()
        choices = [
            {
                "index": index,
                "token_ids": [*request["prompt"], index],
                "logprobs": {"token_logprobs": [-0.25] * (len(request["prompt"]) + 1)},
                "finish_reason": "length",
            }
            for index in reversed(range(request["n"]))
        ]
        for choice in choices:
            self.server.edit(choice)
        self._answer({"choices": choices})

    def _answer(self, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        thread = Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


@pytest.fixture
def client(server: FakeServer) -> Iterator[VLLMClient]:
    with VLLMClient(f"http://127.0.0.1:{server.server_port}", request_timeout_s=0.5) as client:
        yield client


def test_rollouts_come_in_order_with_siblings_adjacent(server: FakeServer, client: VLLMClient) -> None:
    prompts = make_prompts(30)
    finished: list[None] = []
    rollouts = client.generate(
        prompts, SAMPLING, num_responses=3, seed=0, version=3, on_rollout=lambda: finished.append(None)
    )
    assert [(r.prompt, r.response_ids) for r in rollouts] == [
        (prompt, [*prompt.token_ids, sibling]) for prompt in prompts for sibling in range(3)
    ]
    assert {(r.policy_version, r.finish_reason) for r in rollouts} == {(3, "length")}
    assert len(finished) == 90


def test_a_request_leaves_no_sampling_parameter_to_the_servers_defaults(server: FakeServer, client: VLLMClient) -> None:
    client.generate(make_prompts(2), SAMPLING, num_responses=3, seed=0, version=3)
    first, second = server.requests
    assert first["seed"] != second["seed"]
    expected = {
        "n": 3,
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": ["end"],
        "include_stop_str_in_output": True,
    }
    assert {name: first[name] for name in expected} == expected


def test_other_weights_than_expected_are_an_error(server: FakeServer, client: VLLMClient) -> None:
    with pytest.raises(ServerError, match=r"holds weights of version 3, not 4"):
        client.generate(make_prompts(1), SAMPLING, num_responses=1, seed=0, version=4)
    assert server.requests == []


def test_weights_that_change_during_generation_are_an_error(server: FakeServer, client: VLLMClient) -> None:
    server.before_answer = lambda: setattr(server, "version", "4")
    with pytest.raises(ServerError, match=r"holds weights of version 4, not 3"):
        client.generate(make_prompts(1), SAMPLING, num_responses=1, seed=0, version=3)


def test_an_answer_that_does_not_come_ends_at_the_deadline(server: FakeServer, client: VLLMClient) -> None:
    server.before_answer = lambda: time.sleep(3)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"longer than fleet\.request_timeout_s = 0\.5 s; raise it"):
        client.generate(make_prompts(2), SAMPLING, num_responses=1, seed=0, version=3)
    assert time.monotonic() - started < 2


def test_a_missing_response_is_an_error(server: FakeServer, client: VLLMClient) -> None:
    server.edit = lambda choice: choice["token_ids"].pop()
    with pytest.raises(ServerError, match=r"has 5 tokens and 6 log-probs"):
        client.generate(make_prompts(1), SAMPLING, num_responses=1, seed=0, version=3)


def test_an_unknown_ending_is_an_error(server: FakeServer, client: VLLMClient) -> None:
    server.edit = lambda choice: choice.update(finish_reason="repetition")
    with pytest.raises(ServerError, match=r"ended for 'repetition'"):
        client.generate(make_prompts(1), SAMPLING, num_responses=1, seed=0, version=3)


def test_a_server_that_is_gone_is_an_error() -> None:
    with (
        VLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client,
        pytest.raises(ServerError, match=r"127\.0\.0\.1:9/weight_info is unreachable"),
    ):
        client.generate(make_prompts(1), SAMPLING, num_responses=1, seed=0, version=3)
