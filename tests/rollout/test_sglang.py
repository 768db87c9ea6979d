"""Replies and weights; and, where SGLang can be imported, the client against its real HTTP front end."""

from __future__ import annotations

import importlib.util
import json
import pickle
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from megatron_orz.config import FleetConfig, ModelConfig, SamplingConfig, TransportKind
from megatron_orz.rollout import sglang_sender
from megatron_orz.rollout.client import GenerationRequest
from megatron_orz.rollout.kinds import server_runs, weight_sender
from megatron_orz.rollout.server_group import open_group
from megatron_orz.rollout.servers import InferenceServer, Launch, RefusedError, ServerError, base_environment, free_port
from megatron_orz.rollout.sglang_client import SGLangClient
from megatron_orz.rollout.sglang_main import Secret
from megatron_orz.rollout.sglang_sender import SGLangSender
from megatron_orz.rollout.sglang_server import _command, sglang_launch
from megatron_orz.rollout.token import TOKEN_VARIABLE, authorization
from tests.rollout import stand_in
from tests.rollout.conftest import make_prompts, model_config
from tests.rollout.stand_in_fleet import contents
from tests.rollout.test_process import wait_for

SAMPLING = SamplingConfig(max_response_tokens=8, temperature=0.5, stop=("end",))
HAS_SGLANG = importlib.util.find_spec("sglang") is not None


def request(num_responses: int = 2) -> GenerationRequest:
    return GenerationRequest(
        request_id="v3-s0-p0",
        prompt=make_prompts(1)[0],
        num_responses=num_responses,
        seed=0,
        sampling=SAMPLING,
        version=3,
    )


def sibling(**meta_info: Any) -> dict[str, Any]:
    info = {
        "finish_reason": {"type": "stop", "matched": 1},
        "weight_version": "3",
        "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]],
    }
    return {"output_ids": [7, 8], "meta_info": info | meta_info}


def respond(reply: Any, num_responses: int = 2) -> list[Any]:
    with SGLangClient("http://127.0.0.1:9", request_timeout_s=1) as client:
        return client._rollouts(reply, request(num_responses))


def test_one_response_comes_alone_and_siblings_in_a_list() -> None:
    (alone,) = respond(sibling(), num_responses=1)
    assert (alone.response_ids, alone.rollout_log_probs, alone.finish_reason) == ([7, 8], [-0.5, -0.25], "stop")
    assert len(respond([sibling(), sibling()])) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([sibling()], "1 responses, not 2"),
        ([sibling(), sibling(weight_version="4")], r"the weights are of version .*'4'.*, not 3"),
        ([sibling(), sibling(finish_reason={"type": "abort"})], "ended for 'abort'"),
        ([sibling(), sibling(output_token_logprobs=[[-0.5, 7, None]])], "2 tokens and 1 log-probs"),
        ({"error": "busy"}, "something else than responses"),
    ],
)
def test_a_reply_that_is_not_whole_is_an_error(reply: Any, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        respond(reply)


class Loader(SGLangClient):
    """Keeps what it is told to load."""

    weights: dict[str, torch.Tensor]
    files: list[str]

    def load(self, directory: str, version: int, *, timeout_s: float) -> None:
        self.files = sorted(file.name for file in Path(directory).iterdir())
        self.weights = {}
        for file in Path(directory).glob("*.safetensors"):
            self.weights |= load_file(file)


def test_weights_are_written_whole_in_shards_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sglang_sender, "MAX_SHARD_BYTES", 100)
    live = torch.zeros(20)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(5):
            live.fill_(index)  # as an engine that gathers into the same memory
            yield str(index), live.view(4, 5).t()

    client = Loader("http://127.0.0.1:9", request_timeout_s=1)
    sender = SGLangSender([client], model_path=tmp_path, folder=tmp_path / "weights", timeout_s=5)
    sender.send(weights(), 3)
    assert [float(client.weights[str(index)][0, 0]) for index in range(5)] == [0, 1, 2, 3, 4]
    assert all(weight.shape == (5, 4) for weight in client.weights.values())
    assert len(client.files) == 6  # config.json and five shards
    assert list((tmp_path / "weights").iterdir()) == []
    assert set(sender.metrics()) == {"sync/write_s", "sync/load_s"}


def test_a_fleet_without_sglang_or_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"sglang is not installed; .* fleet\.urls"):
        sglang_launch(model_config(tmp_path), FleetConfig(kind="sglang"), index=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, and there is none"):
        sglang_launch(model_config(tmp_path), FleetConfig(kind="sglang"), index=0)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SGLang's front end, as a process."""
    if not HAS_SGLANG:
        pytest.skip("sglang cannot be imported")
    port = free_port()
    log = tmp_path_factory.mktemp("sglang") / "sglang.log"
    command = [sys.executable, "-m", "tests.rollout.sglang_app", str(port)]
    launch = Launch(command=command, environment=base_environment(), port=port)
    with InferenceServer(launch, start_timeout_s=300, log_path=log) as server:

        def answers() -> bool:
            server.check_alive()
            try:
                return httpx.get(f"{server.url}/loaded", headers=authorization(), trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, timeout_s=300)
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["disk", "gloo"])
def test_a_fleet_runs_on_sglangs_own_routes(url: str, tmp_path: Path, transport: TransportKind) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    fleet = FleetConfig(kind="sglang", urls=(url,), transport=transport)
    model: ModelConfig = model_config(tmp_path)
    runs = server_runs("sglang", fleet, model, run_dir=tmp_path)
    connect = weight_sender("sglang", fleet, model, run_dir=tmp_path)
    prompts = make_prompts(5)
    with open_group(runs, SAMPLING, fleet, connect=connect, on_wait=lambda elapsed_s: None) as group:
        for version in range(3):
            group.update_weights(iter([("a", torch.full((4,), float(version))), ("b", torch.ones(3))]), version)
            loaded = httpx.get(f"{url}/loaded", headers=authorization(), trust_env=False).json()
            assert loaded == [f"a={4 * version}", "b=3"]
            for num_responses in (1, 3):
                answers = group.generate(prompts, num_responses=num_responses, seed=0)
                assert contents([rollout for siblings in answers.values() for rollout in siblings]) == [
                    (prompt.prompt_id, stand_in.response(prompt.token_ids, 0, sibling, version), version)
                    for prompt in prompts
                    for sibling in range(num_responses)
                ]


@pytest.mark.slow
def test_who_does_not_know_the_token_is_refused_by_sglangs_own_check(url: str) -> None:
    for headers in ({}, {"Authorization": "Bearer other"}):
        for path in ("/generate", "/update_weights_from_disk", "/update_weight_version", "/pause_generation"):
            assert httpx.post(f"{url}{path}", headers=headers, json={}, trust_env=False).status_code == 401
        assert httpx.get(f"{url}/loaded", headers=headers, trust_env=False).status_code == 401
        assert httpx.get(f"{url}/metrics", headers=headers, trust_env=False).status_code == 200


def test_the_token_comes_after_the_arguments_are_read_and_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own: what SGLang imports and replaces stays there."""
    if not HAS_SGLANG:
        pytest.skip("sglang cannot be imported")
    command = _command(model_config(tmp_path), FleetConfig(kind="sglang", max_running=16), host="127.0.0.1", port=1)
    script = "from tests.rollout.sglang_app import print_server_args; print_server_args()"
    environment = base_environment() | {TOKEN_VARIABLE: "a-secret"}
    arguments = [*command[command.index("--model-path") :], "--device", "cpu"]
    shown = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "api_key=Secret(...)" in shown.stdout, shown.stderr
    assert "a-secret" not in shown.stdout + shown.stderr


def test_a_secret_is_the_string_and_does_not_show_it() -> None:
    secret = Secret("a-secret")
    for copy in (secret, pickle.loads(pickle.dumps(secret))):
        assert copy == "a-secret"
        assert "a-secret" not in repr(copy) + f"{[copy]!r}"
        assert secrets.compare_digest(copy, "a-secret")


@pytest.mark.slow
def test_sglang_refuses_what_its_schema_does_not_hold(url: str) -> None:
    """The front end does check: a body of another form is refused, and so is one with an impossible value."""
    with SGLangClient(url, request_timeout_s=60) as client:
        body = client.body(request())
        client.set_version(3)
        client.post("/generate", body)
        with pytest.raises(RefusedError, match="answered 4"):
            client.post("/generate", body | {"input_ids": "text"})
        with pytest.raises(RefusedError, match="top_p must be in"):
            client.post("/generate", body | {"sampling_params": body["sampling_params"] | {"top_p": 2.0}})


@pytest.mark.skipif(not HAS_SGLANG, reason="sglang cannot be imported")
def test_the_command_line_and_the_counter_are_sglangs_own(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / "srt"
    collector = (root / "observability" / "metrics_collector.py").read_text()
    assert all(f'name="{metric}"' in collector for metric in SGLangClient.progress_metrics)
    arguments = "".join(file.read_text() for file in [root / "server_args.py", *(root / "arg_groups").rglob("*.py")])
    command = _command(model_config(tmp_path), FleetConfig(kind="sglang", max_running=16), host="127.0.0.1", port=1)
    for flag in (part for part in command if part.startswith("--")):
        name = flag.removeprefix("--")
        assert f'"{flag}"' in arguments or f" {name.replace('-', '_')}:" in arguments, flag
