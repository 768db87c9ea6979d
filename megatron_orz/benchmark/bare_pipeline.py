"""A pipeline without an engine: the senders of its stages, on threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_orz.config import TransportKind, Verification
from megatron_orz.rollout.stage_senders import StageSender
from megatron_orz.rollout.transports import build_transport
from megatron_orz.rollout.weight_sender import Client, WeightSender
from megatron_orz.types import Metrics, NamedWeights

_END_TIMEOUT_S = 30.0


class BarePipeline:
    """Stages that send their weights to the same servers.

    folder: of the disk transport. num_stages: 1 is a `WeightSender` alone.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        kind: TransportKind,
        folder: Path,
        *,
        num_stages: int,
        timeout_s: float,
        verification: Verification,
        delta: bool = False,
    ) -> None:
        halves = [build_transport(kind, folder=folder / f"stage-{stage}") for stage in range(num_stages)]
        self._leader = WeightSender(
            clients, halves[0], timeout_s=timeout_s, verification=verification, delta=delta, num_senders=num_stages
        )
        offer = self._leader.invite()
        self._senders: list[WeightSender | StageSender] = [self._leader]
        for stage in range(1, num_stages):
            self._senders.append(StageSender(halves[stage], offer, stage, verification=verification))
        self.errors: list[BaseException | None] = []
        """Of the followers, in what was asked last."""
        self._threads = ThreadPoolExecutor(num_stages, "stage")

    def connect(self) -> None:
        """Joins the servers."""
        self._together([sender.connect for sender in self._senders])

    def send(self, parts: Sequence[NamedWeights], version: int) -> None:
        """parts: the weights of each stage; one that has none does not come."""
        pairs = zip(self._senders, parts, strict=False)
        self._together([partial(sender.send, weights, version) for sender, weights in pairs])

    def metrics(self) -> Metrics:
        """Of the last update of all stages."""
        return self._leader.metrics()

    def close(self) -> None:
        """Leaves the servers."""
        for sender in self._senders:
            sender.close()
        self._threads.shutdown(wait=False)

    def _together(self, actions: Sequence[Callable[[], None]]) -> None:
        """Raises what fails on the leader, or else on a follower."""
        futures = [self._threads.submit(action) for action in actions[1:]]
        try:
            actions[0]()
        finally:
            self.errors = [future.exception(_END_TIMEOUT_S) for future in futures]
        for future in futures:
            future.result()
