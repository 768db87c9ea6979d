"""A pipeline without an engine: the senders of its stages, on threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_orz.config import TransportKind, Verification
from megatron_orz.rollout.stage_senders import StageSender
from megatron_orz.rollout.transports import build_transport
from megatron_orz.rollout.weight_sender import Client, WeightSender
from megatron_orz.types import Metrics, NamedWeights

_END_TIMEOUT_S = 10.0


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
        self.leader = WeightSender(
            clients, halves[0], timeout_s=timeout_s, verification=verification, delta=delta, num_senders=num_stages
        )
        offer = self.leader.invite()
        self.followers = [
            StageSender(half, offer, stage, verification=verification) for stage, half in enumerate(halves) if stage
        ]
        self.errors: list[BaseException | None] = []
        """Of the followers, in what was asked last."""
        self._threads = ThreadPoolExecutor(num_stages, "stage")

    def connect(self) -> None:
        """Joins the servers."""
        self._together(self.leader.connect, [follower.connect for follower in self.followers])

    def send(self, parts: Sequence[NamedWeights], version: int) -> None:
        """parts: the weights of each stage."""

        def send(sender: WeightSender | StageSender, weights: NamedWeights) -> Callable[[], None]:
            return lambda: sender.send(weights, version)

        first, *others = map(send, (self.leader, *self.followers), parts)
        self._together(first, others)

    def metrics(self) -> Metrics:
        """Of the last update of all stages."""
        return self.leader.metrics()

    def close(self) -> None:
        """Leaves the servers."""
        for sender in (self.leader, *self.followers):
            sender.close()
        self._threads.shutdown(wait=False)

    def _together(self, leading: Callable[[], None], following: Sequence[Callable[[], None]]) -> None:
        """Raises what fails on the leader, or else on a follower."""
        futures: list[Future[None]] = [self._threads.submit(action) for action in following]
        try:
            leading()
        finally:
            self.errors = [future.exception(_END_TIMEOUT_S) for future in futures]
        for future in futures:
            future.result()
