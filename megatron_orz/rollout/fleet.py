"""The fleets a run can have. `open_fleet` builds the one the config names, and closes it whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_orz.config import FleetConfig, ModelConfig, SamplingConfig
from megatron_orz.ranks import Ranks, exhausting
from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.local import LocalFleet
from megatron_orz.rollout.servers import ServerError, VLLMServer
from megatron_orz.rollout.transport import WeightSender
from megatron_orz.rollout.transports import SERVER_ARGUMENTS, build_transport
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.wire import RolloutArrays
from megatron_orz.types import Fleet, NamedWeights, Prompt, Rollout

_DEATH_WAIT_S = 2.0
"""How long a server whose connection broke is given to end, so that the error can say that it has."""


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

    on_wait: called with the seconds elapsed a few times a second while a server starts, on rank 0.
    """
    with ExitStack() as stack:
        ranks = Ranks()
        stack.callback(ranks.close)
        match fleet.kind:
            case "local":
                yield LocalFleet(model, sampling, ranks=ranks, max_batch_rollouts=fleet.max_batch_rollouts)
            case "vllm":
                replica = None
                with ranks.share_fate("starting the server"):
                    if ranks.rank == 0:
                        replica = stack.enter_context(
                            _start_replica(fleet, sampling, model, log_path=run_dir / "vllm.log", on_wait=on_wait)
                        )
                yield VLLMFleet(replica, ranks=ranks)


class VLLMFleet:
    """A Fleet of one vLLM server, which rank 0 alone talks to."""

    def __init__(self, replica: VLLMReplica | None, *, ranks: Ranks) -> None:
        """replica: on rank 0 only."""
        self._replica = replica
        self._ranks = ranks
        self._version = INITIAL_VERSION

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the server's weights. After an error the server holds neither the old nor the new ones."""
        with self._ranks.share_fate("the weight update"), exhausting(weights):
            if self._replica is not None:
                self._replica.update_weights(weights, version)
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
            if self._replica is not None:
                arrays = RolloutArrays.pack(
                    self._replica.generate(
                        prompts, num_responses=num_responses, seed=seed, version=self._version, on_rollout=on_rollout
                    )
                )
        return self._ranks.broadcast(arrays).unpack(prompts, num_responses=num_responses, version=self._version)


class VLLMReplica:
    """One server, its client, and the way new weights reach it."""

    def __init__(self, server: VLLMServer, client: VLLMClient, sender: WeightSender, sampling: SamplingConfig) -> None:
        self._server = server
        self._client = client
        self._sender = sender
        self._sampling = sampling
        self._is_sound = True

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """New weights, all or the server is lost: an update that fails midway cannot be taken back."""
        with self._explained():
            self._is_sound = False
            self._sender.send(weights, version)
            self._is_sound = True

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        version: int,
        on_rollout: Callable[[], None] | None,
    ) -> list[Rollout]:
        """The rollouts of the weights of `version`."""
        with self._explained():
            return self._client.generate(
                prompts,
                self._sampling,
                num_responses=num_responses,
                seed=seed,
                version=version,
                on_rollout=on_rollout,
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says that the server has died where that is why a call failed, and where to look in any case."""
        if not self._is_sound:
            raise ServerError("an earlier weight update failed, so the server is unusable; restart the run")
        try:
            yield
        except RuntimeError as error:
            self._server.check_alive(wait_s=_DEATH_WAIT_S)
            error.add_note(f"The server's log is {self._server.log_path}.")
            raise


@contextmanager
def _start_replica(
    fleet: FleetConfig,
    sampling: SamplingConfig,
    model: ModelConfig,
    *,
    log_path: Path,
    on_wait: Callable[[float], None],
) -> Iterator[VLLMReplica]:
    transport = build_transport(fleet, folder=log_path.parent / "weights", is_one_machine=True)
    with ExitStack() as stack:
        server = stack.enter_context(VLLMServer(model, fleet, transfer_arguments=SERVER_ARGUMENTS, log_path=log_path))
        server.wait_until_healthy(on_wait)
        client = stack.enter_context(VLLMClient(server.url, request_timeout_s=fleet.request_timeout_s))
        sender = WeightSender([client], transport, timeout_s=fleet.update_timeout_s, verification=fleet.verification)
        stack.callback(sender.close)
        sender.connect()
        client.post("/update_weight_version", {"new_version": str(INITIAL_VERSION)})
        yield VLLMReplica(server, client, sender, sampling)
