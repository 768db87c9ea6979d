"""A `ServerGroup` of stand-ins: real processes under the real supervisor, real HTTP, real restarts."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.ranks import Ranks
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.fleet import ServerFleet
from megatron_orz.rollout.replica import Running
from megatron_orz.rollout.sampling import prompt_seed
from megatron_orz.rollout.server_group import ServerGroup, open_group
from megatron_orz.rollout.servers import InferenceServer, Launch, free_port
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.vllm_spans import SpanVLLMClient
from megatron_orz.types import Metrics, NamedWeights, Prompt, RepeatableWeights, Rollout
from tests.rollout import stand_in

SAMPLING = SamplingConfig(max_response_tokens=8, temperature=0.5, stop=("end",))
_TIMEOUT_S = 60.0


class VersionSender:
    """Stands in for the weight exchange: tells every server its version, or fails with all as a broadcast does."""

    def __init__(self, clients: Sequence[ServerClient]) -> None:
        self._clients = clients

    def send(self, weights: NamedWeights, version: int) -> None:
        for _ in weights:
            pass
        for client in self._clients:
            client.set_version(version)

    def metrics(self) -> Metrics:
        return {}

    def close(self) -> None:
        pass


@dataclass
class StandIns:
    """A group of stand-ins and what a test may do to them."""

    group: ServerGroup
    processes: dict[int, InferenceServer]
    """The latest process of each."""

    def __post_init__(self) -> None:
        self.fleet = ServerFleet(self.group, ranks=Ranks())

    def pid(self, index: int) -> int:
        """Of the server itself, not of its supervisor."""
        (child,) = psutil.Process(self.processes[index].pid).children()
        return child.pid

    def kill(self, index: int) -> None:
        os.kill(self.pid(index), signal.SIGKILL)

    def fault(self, index: int, **faults: Any) -> None:
        """Arms faults of one server, in place of those armed before."""
        url = f"{self.processes[index].url}/fault"
        httpx.post(url, json=faults, timeout=_TIMEOUT_S, trust_env=False).raise_for_status()

    def hold(self, *indices: int) -> None:
        """Has servers keep their answers until `release`."""
        for index in indices:
            self.fault(index, holds=True)

    def release(self, *indices: int) -> None:
        """Has servers answer what they hold, and whatever comes."""
        for index in indices:
            self.fault(index)

    def requests(self, index: int) -> list[dict[str, Any]]:
        """The generation requests one server has got."""
        answer: list[dict[str, Any]] = self._get(index, "requests")
        return answer

    def num_requests(self) -> int:
        """The generation requests all servers have got."""
        return sum(len(self.requests(index)) for index in self.processes)

    def calls(self, index: int) -> list[str]:
        """The other POSTs one server has got."""
        answer: list[str] = self._get(index, "calls")
        return answer

    def generate(self, prompts: Sequence[Prompt], *, seed: int = 0) -> list[Rollout]:
        """Three responses to each prompt."""
        answers = self.group.generate(prompts, num_responses=3, seed=seed)
        return list(chain.from_iterable(answers.values()))

    def update(self, version: int) -> None:
        """As a run does it, with weights that can be gathered again."""
        self.fleet.update_weights(RepeatableWeights(lambda: iter([])), version)

    def _get(self, index: int, what: str) -> Any:
        return httpx.get(f"{self.processes[index].url}/{what}", timeout=_TIMEOUT_S, trust_env=False).json()


def stand_in_launch(port: int, **faults: Any) -> Launch:
    """How a stand-in is started, with faults from the start."""
    command = [sys.executable, "-S", stand_in.__file__, str(port), json.dumps(faults)]
    return Launch(command=command, environment=dict(os.environ), port=port)


@contextmanager
def open_stand_ins(run_dir: Path, num_servers: int, **fleet: Any) -> Iterator[StandIns]:
    config = FleetConfig(**{"num_servers": num_servers, "start_timeout_s": 120, **fleet})
    processes: dict[int, InferenceServer] = {}
    ports: set[int] = set()  # a server that starts may not listen yet when a port is looked for for the next one

    def start(index: int) -> Any:
        def run(num_restarts: int) -> Running:
            while (port := free_port()) in ports:
                continue
            ports.add(port)
            process = InferenceServer(
                stand_in_launch(port),
                start_timeout_s=config.start_timeout_s,
                log_path=run_dir / f"stand-in-{index}-{num_restarts}.log",
            )
            processes[index] = process
            kind = SpanVLLMClient if config.swaps_within_responses else VLLMClient
            client = kind(process.url, request_timeout_s=config.request_timeout_s)
            return Running(client=client, process=process)

        return run

    runs = [(f"server {index}", start(index)) for index in range(num_servers)]
    with open_group(runs, SAMPLING, config, connect=VersionSender, on_wait=lambda elapsed_s: None) as group:
        yield StandIns(group, processes)


def expected(
    prompts: Sequence[Prompt], *, version: int, seed: int = 0, is_seeded: bool = True
) -> list[tuple[int, list[int], int]]:
    """What the stand-ins answer to `StandIns.generate`: prompt id, token ids and version of each rollout, in order.

    is_seeded: requests carry a seed, as they do unless weights swap within responses.
    """
    return [
        (
            prompt.prompt_id,
            stand_in.response(prompt.token_ids, prompt_seed(seed, index) if is_seeded else 0, sibling, version),
            version,
        )
        for index, prompt in enumerate(prompts)
        for sibling in range(3)
    ]


def contents(rollouts: Sequence[Rollout]) -> list[tuple[int, list[int], int]]:
    return [(r.prompt.prompt_id, r.response_ids, r.policy_version) for r in rollouts]
