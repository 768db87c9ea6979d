"""The fleets a run can have. `open_fleet` builds the one the config names, and closes it whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megatron_orz.config import FleetConfig, ModelConfig, SamplingConfig
from megatron_orz.ranks import Ranks, exhausting
from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.local import LocalFleet
from megatron_orz.rollout.replica import Running
from megatron_orz.rollout.server_group import ServerGroup, ServersLostError, open_group
from megatron_orz.rollout.servers import InferenceServer
from megatron_orz.rollout.transport import WeightSender
from megatron_orz.rollout.transports import SERVER_ARGUMENTS, build_transport, choose_transport
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.vllm_server import vllm_launch
from megatron_orz.rollout.wire import RolloutArrays
from megatron_orz.types import Fleet, Metrics, NamedWeights, Prompt, RepeatableWeights, Rollout

MAX_UPDATES = 3
"""Attempts at one weight update, as servers may die during it."""


@contextmanager
def open_fleet(
    fleet: FleetConfig,
    sampling: SamplingConfig,
    model: ModelConfig,
    *,
    run_dir: Path,
    on_wait: Callable[[float], None] = lambda elapsed_s: None,
) -> Iterator[Fleet]:
    """The fleet of a run, called on every rank. `model` says what the servers start from.

    on_wait: called with the seconds elapsed a few times a second while servers start, on rank 0.
    """
    with ExitStack() as stack:
        ranks = Ranks()
        stack.callback(ranks.close)
        match fleet.kind:
            case "local":
                yield LocalFleet(model, sampling, ranks=ranks, max_batch_rollouts=fleet.max_batch_rollouts)
            case "vllm":
                group = None
                choose_transport(fleet)  # raises for one that cannot be, before servers start
                with ranks.share_fate("starting the servers"):
                    if ranks.rank == 0:
                        group = stack.enter_context(
                            open_group(
                                _runs(fleet, model, run_dir=run_dir),
                                sampling,
                                fleet,
                                connect=partial(_connect, fleet=fleet, folder=run_dir / "weights"),
                                on_wait=on_wait,
                            )
                        )
                yield ServerFleet(group, ranks=ranks)


class ServerFleet:
    """A Fleet of inference servers, which rank 0 alone talks to."""

    def __init__(self, servers: ServerGroup | None, *, ranks: Ranks) -> None:
        """servers: on rank 0 only."""
        self._servers = servers
        self._ranks = ranks
        self._version = INITIAL_VERSION

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the weights of every server that is up.

        When servers die of it, the weights are gathered and sent once more, if they can be.
        """
        for attempt in range(1, MAX_UPDATES + 1):
            lost = ""
            is_last = attempt == MAX_UPDATES or not isinstance(weights, RepeatableWeights)
            with self._ranks.share_fate("the weight update"), exhausting(weights):
                if self._servers is not None:
                    try:
                        self._servers.update_weights(weights, version)
                    except ServersLostError as error:
                        if is_last:
                            raise
                        lost = str(error)
            if not self._ranks.broadcast(lost):
                break
            assert isinstance(weights, RepeatableWeights)
            weights = weights.again()
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each prompt, siblings adjacent, in the order of the prompts."""
        arrays = None
        with self._ranks.share_fate("generation"):
            if self._servers is not None:
                arrays = RolloutArrays.pack(
                    self._servers.generate(
                        prompts, num_responses=num_responses, seed=seed, version=self._version, on_rollout=on_rollout
                    )
                )
        return self._ranks.broadcast(arrays).unpack(prompts, num_responses=num_responses, version=self._version)

    def metrics(self) -> Metrics:
        """What happened to the servers since the run began; empty on all ranks but the first."""
        return self._servers.metrics() if self._servers is not None else {}


def _runs(fleet: FleetConfig, model: ModelConfig, *, run_dir: Path) -> list[tuple[str, Callable[[int], Running]]]:
    """A name for each server, and what starts or finds it."""
    if fleet.urls:
        return [(f"the server at {url}", partial(_find, url, fleet)) for url in fleet.urls]
    if fleet.num_servers == 1:
        return [("the server", partial(_start, 0, "vllm", fleet, model, run_dir))]
    return [
        (f"server {index}", partial(_start, index, f"vllm-{index}", fleet, model, run_dir))
        for index in range(fleet.num_servers)
    ]


def _find(url: str, fleet: FleetConfig, num_restarts: int) -> Running:
    return Running(client=VLLMClient(url, request_timeout_s=fleet.request_timeout_s), process=None)


def _start(
    index: int, log_name: str, fleet: FleetConfig, model: ModelConfig, run_dir: Path, num_restarts: int
) -> Running:
    launch = vllm_launch(model, fleet, index=index, transfer_arguments=SERVER_ARGUMENTS)
    suffix = f"-restart-{num_restarts}" if num_restarts else ""
    process = InferenceServer(
        launch, start_timeout_s=fleet.start_timeout_s, log_path=run_dir / f"{log_name}{suffix}.log"
    )
    return Running(client=VLLMClient(process.url, request_timeout_s=fleet.request_timeout_s), process=process)


def _connect(clients: Sequence[ServerClient], *, fleet: FleetConfig, folder: Path) -> WeightSender:
    """folder: of weights on their way over the disk."""
    sender = WeightSender(
        [client for client in clients if isinstance(client, VLLMClient)],
        build_transport(choose_transport(fleet), folder=folder),
        timeout_s=fleet.update_timeout_s,
        verification=fleet.verification,
    )
    try:
        sender.connect()
    except RuntimeError:
        sender.close()
        raise
    return sender
