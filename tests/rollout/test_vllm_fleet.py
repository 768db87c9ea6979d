"""A real vLLM server on the CPU. One start serves the tests of this file; the tests marked slow start another."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from threading import Timer

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.rollout import replica, transport
from megatron_orz.rollout.client import GenerationRequest
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.rollout.servers import RefusedError, ServerError, free_port
from megatron_orz.rollout.token import authorization
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.types import Fleet, Prompt, RepeatableWeights, Rollout
from tests.launch import run_ranks
from tests.rollout.conftest import (
    check_endings,
    log_prob_error,
    make_prompts,
    model_config,
    named_weights,
    tiny_model,
)
from tests.rollout.test_process import wait_for

pytest.importorskip("vllm")

SAMPLING = SamplingConfig(max_response_tokens=40, stop=("ab", "z", "Q(", "#}", "~~", "@!"))
# Both sides compute in float32, with other kernels; the weights of two seeds differ by more than 1 nat.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Running:
    fleet: Fleet
    url: str
    processes: list[psutil.Process]


def run_server(checkpoint: Path, run_dir: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # So small that layers straddle buckets.
        patch.setattr(transport, "BUCKET_BYTES", 4096)
        port = free_port()
        config = FleetConfig(port=port, max_model_tokens=1024, kv_cache_gib=0.25)
        with open_fleet(config, SAMPLING, model_config(checkpoint), run_dir=run_dir) as fleet:
            yield Running(fleet, f"http://127.0.0.1:{port}", processes := processes_of(fleet, 0))
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, "the server left processes behind"


def processes_of(fleet: Fleet, index: int) -> list[psutil.Process]:
    """The supervisor of a server, its API server and whatever is below."""
    assert isinstance(fleet, ServerFleet)
    assert fleet._servers is not None
    running = fleet._servers._replicas[index]._running
    assert running is not None
    assert running.process is not None
    supervisor = psutil.Process(running.process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def ask(url: str, prompts: list[Prompt], sampling: SamplingConfig) -> list[Rollout]:
    """Four responses to each prompt, with other sampling than the fleet's."""

    async def ask_all() -> list[list[Rollout]]:
        requests = [
            GenerationRequest(
                request_id=f"ask-{index}", prompt=prompt, num_responses=4, seed=index, sampling=sampling, version=-1
            )
            for index, prompt in enumerate(prompts)
        ]
        with VLLMClient(url, request_timeout_s=300) as client:
            async with httpx.AsyncClient(trust_env=False, headers=authorization()) as http:
                return await asyncio.gather(*(client.respond(http, request) for request in requests))

    return list(chain.from_iterable(asyncio.run(ask_all())))


@pytest.fixture(scope="module")
def tied(tied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from run_server(tied_checkpoint, tmp_path_factory.mktemp("tied-server"))


@pytest.fixture(scope="module")
def untied(untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from run_server(untied_checkpoint, tmp_path_factory.mktemp("untied-server"))


def update_and_compare(running: Running, *, is_tied: bool) -> None:
    """After each update the log-probs are those of the new weights and of no older ones, also for prompts whose
    keys and values the server has cached."""
    prompts = make_prompts(8)
    # Only whole blocks of keys and values are cached, of up to 128 tokens.
    prompts += [replace(prompt, token_ids=(prompt.token_ids * 100)[:300]) for prompt in prompts[:2]]
    running.fleet.generate(prompts, num_responses=2, seed=0)
    previous = None
    for version in range(3):
        model = tiny_model(tied=is_tied, seed=20 + version)
        running.fleet.update_weights(named_weights(model), version)
        rollouts = running.fleet.generate(prompts, num_responses=4, seed=0)
        assert {rollout.policy_version for rollout in rollouts} == {version}
        assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE
        if previous is not None:
            assert log_prob_error(previous, rollouts, SAMPLING) > 1
        previous = model


def test_log_probs_equal_those_of_a_forward_pass(tied: Running) -> None:
    rollouts = tied.fleet.generate(make_prompts(20), num_responses=4, seed=0)
    assert {rollout.policy_version for rollout in rollouts} == {-1}
    assert log_prob_error(tiny_model(tied=True, seed=0), rollouts, SAMPLING) < TOLERANCE


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_response_tokens=40, temperature=0.7, stop=()),
        SamplingConfig(max_response_tokens=40, temperature=1.3, top_k=20, top_p=0.9, stop=()),
    ],
    ids=["temperature", "top"],
)
def test_log_probs_are_those_of_the_sampling_distribution(tied: Running, sampling: SamplingConfig) -> None:
    rollouts = ask(tied.url, make_prompts(20), sampling)
    assert log_prob_error(tiny_model(tied=True, seed=0), rollouts, sampling) < TOLERANCE


def test_responses_end_at_the_first_stop_and_keep_it(tied: Running) -> None:
    prompts = make_prompts(40)
    finished: list[None] = []
    rollouts = tied.fleet.generate(prompts, num_responses=20, seed=0, on_rollout=lambda: finished.append(None))
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(20)]
    assert len(finished) == len(rollouts)
    assert check_endings(rollouts, SAMPLING) == {"eos", "length", *SAMPLING.stop}


def test_the_seed_decides_the_rollouts(tied: Running) -> None:
    prompts = make_prompts(4)
    first, again, other = (
        [r.response_ids for r in tied.fleet.generate(prompts, num_responses=4, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again
    assert not set(map(tuple, first)) & set(map(tuple, other))
    assert len(set(map(tuple, first))) == 16, "siblings repeat each other"


def test_updates_of_a_tied_model_reach_every_weight(tied: Running) -> None:
    update_and_compare(tied, is_tied=True)


def test_a_foreign_update_is_noticed(tied: Running) -> None:
    tied.fleet.update_weights(named_weights(tiny_model(tied=True, seed=0)), 5)
    with VLLMClient(tied.url, request_timeout_s=60) as client:
        client.set_version(6)
    with pytest.raises(ServerError, match="holds weights of version 6, not 5"):
        tied.fleet.generate(make_prompts(1), num_responses=1, seed=0)
    with VLLMClient(tied.url, request_timeout_s=60) as client:
        client.set_version(5)


def test_a_prompt_too_long_for_the_server_is_refused_with_its_reason(tied: Running) -> None:
    with pytest.raises(RefusedError, match=r"answered 400: .*1024"):
        ask(tied.url, make_prompts(1), SamplingConfig(max_response_tokens=1500))


def test_a_server_killed_during_a_request_is_an_error_not_a_hang(
    tied: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this server: it is the only one, so that the request cannot move on."""
    monkeypatch.setattr(replica, "_DEATH_WAIT_S", 120.0)  # so long a busy machine may take to end all of its processes
    (api_server,) = tied.processes[0].children()
    Timer(0.5, api_server.kill).start()
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"0 of 1 servers .* exit code 137 during the run; see .*vllm\.log"):
        tied.fleet.generate(make_prompts(500), num_responses=20, seed=0)
    assert time.monotonic() - started < 300  # of fleet.request_timeout_s 600


@pytest.mark.slow
def test_updates_of_an_untied_model_reach_every_weight(untied: Running) -> None:
    update_and_compare(untied, is_tied=False)


@pytest.mark.slow
def test_a_server_sleeps_and_wakes_in_stages_around_updates(untied: Running) -> None:
    """On the CPU no memory is given back; the server's state and the order of calls are those of a GPU."""
    assert isinstance(untied.fleet, ServerFleet)

    def is_sleeping() -> bool:
        return bool(httpx.get(f"{untied.url}/is_sleeping", trust_env=False).json()["is_sleeping"])

    for version in range(40, 43):
        model = tiny_model(tied=False, seed=version)
        untied.fleet.sleep()
        assert is_sleeping()
        untied.fleet.wake("weights")
        assert is_sleeping()
        untied.fleet.update_weights(named_weights(model), version)
        untied.fleet.wake("kv_cache")
        assert not is_sleeping()
        rollouts = untied.fleet.generate(make_prompts(8), num_responses=4, seed=0)
        assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE


@pytest.mark.slow
def test_stragglers_leave_nothing_behind_for_the_next_update(untied: Running) -> None:
    """The prefix cache can be reset only when no request holds parts of it."""
    assert isinstance(untied.fleet, ServerFleet)
    for version in range(50, 53):
        model = tiny_model(tied=False, seed=version)
        untied.fleet.update_weights(named_weights(model), version)
        rollouts = untied.fleet.generate_first(make_prompts(200), num_groups=20, num_responses=8, seed=version)
        assert len(rollouts) == 160
        assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE


@pytest.mark.slow
def test_an_incomplete_update_is_refused_and_the_server_started_anew(untied: Running) -> None:
    """The last test of this server."""
    model = tiny_model(tied=False, seed=1)
    weights = [item for item in named_weights(model) if item[0] != "model.norm.weight"]
    with pytest.raises(ServerError, match=r"answered 500"):
        untied.fleet.update_weights(iter(weights), 9)
    with pytest.raises(ServerError, match="a weight update failed"):
        untied.fleet.generate(make_prompts(1), num_responses=1, seed=0)
    untied.fleet.update_weights(named_weights(model), 10)
    rollouts = untied.fleet.generate(make_prompts(8), num_responses=4, seed=0)
    assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE
    untied.processes.extend(processes_of(untied.fleet, 0))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_two_servers_share_the_work_and_one_takes_over_from_the_other(
    tied_checkpoint: Path, tmp_path: Path, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights reach both by one broadcast; one is killed amid its requests, and comes back with the next weights."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = FleetConfig(num_servers=2, server_tp=tp, max_model_tokens=512, kv_cache_gib=0.25)
    prompts = make_prompts(60)

    def weights(seed: int) -> RepeatableWeights:
        return RepeatableWeights(lambda: iter(list(tiny_model(tied=True, seed=seed).named_parameters())))

    with open_fleet(config, SAMPLING, model_config(tied_checkpoint), run_dir=tmp_path) as fleet:
        assert isinstance(fleet, ServerFleet)
        assert fleet._servers is not None
        replicas = fleet._servers._replicas
        for version in range(3):
            wait_for(lambda: all(replica.is_up for replica in replicas), timeout_s=300)
            fleet.update_weights(weights(20 + version), version)
            if version > 0:
                victim = processes_of(fleet, version % 2)[1]
                Timer(0.3, victim.kill).start()
            rollouts = fleet.generate(prompts, num_responses=8, seed=version)
            assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(8)]
            assert {rollout.policy_version for rollout in rollouts} == {version}
            assert log_prob_error(tiny_model(tied=True, seed=20 + version), rollouts, SAMPLING) < TOLERANCE
        assert [replica.num_restarts for replica in replicas] == [1, 1]


def num_generated(url: str) -> float:
    """Tokens that a server has sampled since it was started."""
    metrics = httpx.get(f"{url}/metrics", trust_env=False, headers=authorization()).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("vllm:generation_tokens_total")
    )


def span_errors(models: Mapping[int, PreTrainedModel], rollout: Rollout, *, shift: int = 0) -> list[float]:
    """For every span of a response, the largest difference of its log-probabilities from those of the model of its
    version, or of the `shift`-th version after it."""
    errors, token = [], 0
    ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
    for version, num_tokens in rollout.spans:
        logits = models[(version + shift) % len(models)](ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None]).squeeze(-1)
        difference = expected - torch.tensor(rollout.rollout_log_probs)
        errors.append(difference[token : token + num_tokens].abs().max().item())
        token += num_tokens
    assert token == len(rollout.response_ids)
    return errors


@pytest.mark.slow
def test_responses_go_on_with_new_weights_and_say_which_sampled_what(
    untied_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the old weights had cached is computed anew, so that each span is that of a forward pass of its weights."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port, sampling = free_port(), SamplingConfig(max_response_tokens=500, stop=())
    config = FleetConfig(port=port, max_model_tokens=1024, kv_cache_gib=0.25, swaps_within_responses=True)
    models = {version: tiny_model(tied=False, seed=60 + version) for version in range(3)}
    prompts = make_prompts(24)
    with open_fleet(config, sampling, model_config(untied_checkpoint), run_dir=tmp_path) as fleet:
        assert isinstance(fleet, ServerFleet)
        fleet.update_weights(named_weights(models[0]), 0)
        under_way = fleet.start(prompts, num_responses=8, seed=0, answers={})
        for version in (1, 2):
            before = num_generated(f"http://127.0.0.1:{port}")
            wait_for(lambda: num_generated(f"http://127.0.0.1:{port}") > before + 2000, timeout_s=120)  # noqa: B023
            fleet.update_weights(named_weights(models[version]), version)
        rollouts = under_way.result()
        after = fleet.generate(prompts, num_responses=1, seed=1)
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(8)]
    assert {version for rollout in rollouts for version, _ in rollout.spans} == {0, 1, 2}
    swapped = [rollout for rollout in rollouts if rollout.swaps]
    assert len(swapped) >= 10
    assert max(error for rollout in rollouts for error in span_errors(models, rollout)) < TOLERANCE
    assert min(max(span_errors(models, rollout, shift=1)) for rollout in swapped) > 0.1
    assert {tuple(rollout.spans) for rollout in after} == {((2, len(rollout.response_ids)),) for rollout in after}


def _share_server(checkpoint: Path, run_dir: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo")
    config = FleetConfig(max_model_tokens=512, kv_cache_gib=0.25)
    with open_fleet(config, SAMPLING, model_config(checkpoint), run_dir=run_dir) as fleet:
        model = tiny_model(tied=True, seed=1)
        fleet.update_weights(named_weights(model), 0)
        rollouts = fleet.generate(make_prompts(7), num_responses=3, seed=0)
        assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in make_prompts(7) for _ in range(3)]
        assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_a_server(tied_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(2, _share_server, tied_checkpoint, tmp_path)


TRAINER = """
import sys, time
from pathlib import Path
from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.rollout.fleet import open_fleet
from tests.rollout.conftest import model_config

path, run_dir = map(Path, sys.argv[1:])
fleet = FleetConfig(max_model_tokens=512, kv_cache_gib=0.25)
with open_fleet(fleet, SamplingConfig(max_response_tokens=8), model_config(path), run_dir=run_dir):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["trainer", "trainer-supervisor-server"])
def test_a_killed_trainer_leaves_no_process_of_vllm(tied_checkpoint: Path, tmp_path: Path, everything: bool) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tied_checkpoint), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert trainer.stdout is not None
    assert "ready" in trainer.stdout.readline()
    processes = psutil.Process(trainer.pid).children(recursive=True)
    engine = next(process for process in processes if "EngineCore" in process.name() + " ".join(process.cmdline()))
    trainer.send_signal(signal.SIGKILL)
    if everything:
        for process in processes:
            if process != engine:
                process.kill()
    trainer.communicate()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
