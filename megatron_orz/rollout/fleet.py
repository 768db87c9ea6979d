"""The fleets a run can have. `open_fleet` builds the one the config names, and closes it whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_orz.config import FleetConfig, ModelConfig, SamplingConfig
from megatron_orz.ranks import Ranks, exhausting
from megatron_orz.rollout.client import Memory
from megatron_orz.rollout.kinds import server_client, server_runs, stage_senders, weight_sender
from megatron_orz.rollout.local import LocalFleet
from megatron_orz.rollout.node_senders import NodeSenders
from megatron_orz.rollout.nodes import first_ranks, open_nodes
from megatron_orz.rollout.rank_senders import RankSenders
from megatron_orz.rollout.server_group import ServerGroup, ServersLostError, open_group
from megatron_orz.rollout_arrays import RolloutArrays
from megatron_orz.types import Metrics, NamedWeights, OnAnswer, Prompt, RepeatableWeights, Rollout

MAX_UPDATES = 3
"""Attempts at one weight update, as servers may die during it."""


@contextmanager
def open_fleet(
    fleet: FleetConfig,
    sampling: SamplingConfig,
    model: ModelConfig,
    *,
    run_dir: Path,
    stage: int = 0,
    on_wait: Callable[[float], None] = lambda elapsed_s: None,
) -> Iterator[LocalFleet | ServerFleet]:
    """The fleet of a run, called on every rank. `model` says what the servers start from.

    stage: this rank's place in the pipeline.
    on_wait: called with the seconds elapsed a few times a second while servers start, on rank 0.
    """
    with ExitStack() as stack:
        ranks = Ranks()
        stack.callback(ranks.close)
        match fleet.kind:
            case "local":
                yield LocalFleet(model, sampling, ranks=ranks, max_batch_rollouts=fleet.max_batch_rollouts)
            case kind:
                group = None
                senders: RankSenders[Any] | None
                nodes = stack.enter_context(open_nodes(kind, fleet, model, run_dir=run_dir, ranks=ranks))
                if nodes:
                    connect = weight_sender(kind, fleet, model, run_dir=run_dir, node=f"rank-{ranks.rank}")
                    find = partial(server_client, kind, fleet=fleet)
                    senders = NodeSenders(connect, find, nodes=nodes, ranks=ranks)
                else:
                    stages = ranks.gather(stage)
                    senders = stage_senders(
                        kind,
                        fleet,
                        run_dir=run_dir,
                        first_ranks=[stages.index(stage) for stage in sorted(set(stages))],
                        is_one_node=len(first_ranks(ranks)) == 1,
                        ranks=ranks,
                    )
                if senders:
                    stack.enter_context(closing(senders))
                connect = senders.to if senders else weight_sender(kind, fleet, model, run_dir=run_dir)
                with ranks.share_fate("starting the servers"):
                    if ranks.rank == 0:
                        group = stack.enter_context(
                            open_group(
                                server_runs(kind, fleet, model, run_dir=run_dir, nodes=nodes),
                                sampling,
                                fleet,
                                connect=connect,
                                on_wait=on_wait,
                            )
                        )
                yield ServerFleet(group, ranks=ranks, senders=senders)


class RolloutsUnderWay:
    """Rollouts that servers work on while the ranks do something else."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        num_responses: int,
        future: Future[dict[int, list[Rollout]]] | None,
        ranks: Ranks,
    ) -> None:
        """future: on rank 0 only."""
        self._prompts = list(prompts)
        self._num_responses = num_responses
        self._future = future
        self._ranks = ranks

    def result(self) -> list[Rollout]:
        """Waits for them: siblings adjacent, in the order of the prompts. Collective."""
        arrays = None
        with self._ranks.share_fate("generation"):
            if self._future is not None:
                arrays = RolloutArrays.pack(list(chain.from_iterable(self._future.result().values())))
        return self._ranks.broadcast(arrays).unpack(self._prompts, num_responses=self._num_responses)


class ServerFleet:
    """A Fleet of inference servers, which rank 0 alone talks to; new weights may come from other ranks."""

    def __init__(self, servers: ServerGroup | None, *, ranks: Ranks, senders: RankSenders[Any] | None = None) -> None:
        """servers: on rank 0 only. senders: where several ranks send weights."""
        self._servers = servers
        self._ranks = ranks
        self._senders = senders

    def listen(self, on_answer: OnAnswer) -> None:
        """Has `on_answer` called on rank 0 with the siblings of every prompt as soon as a server has answered it."""
        if self._servers is not None:
            self._servers.listen(on_answer)

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Replaces the weights of every server that is up.

        When servers die of it, the weights are gathered and sent once more, if they can be.
        """
        if isinstance(weights, RepeatableWeights):
            weights = self._senders.share(weights) if self._senders is not None else weights.on_first_rank()
        for attempt in range(1, MAX_UPDATES + 1):
            lost = ""
            is_last = attempt == MAX_UPDATES or not isinstance(weights, RepeatableWeights)
            with self._ranks.share_fate("the weight update"), exhausting(weights):
                if self._servers is None and self._senders is not None:
                    self._senders.follow(weights)
                elif self._servers is not None:
                    try:
                        with self._senders.leading() if self._senders is not None else nullcontext():
                            self._servers.update_weights(weights, version)
                    except ServersLostError as error:
                        if is_last:
                            raise
                        lost = str(error)
            if not self._ranks.broadcast(lost):
                break
            assert isinstance(weights, RepeatableWeights)
            weights = weights.again()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each prompt, siblings adjacent, in the order of the prompts."""
        return self.generate_first(
            prompts, num_groups=len(prompts), num_responses=num_responses, seed=seed, on_rollout=on_rollout
        )

    def generate_first(
        self,
        prompts: Sequence[Prompt],
        *,
        num_groups: int,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """The rollouts of the `num_groups` prompts that are answered first, siblings adjacent, in their order."""
        answers = None
        with self._ranks.share_fate("generation"):
            if self._servers is not None:
                siblings = self._servers.generate(
                    prompts, num_responses=num_responses, seed=seed, num_groups=num_groups, on_rollout=on_rollout
                )
                answers = list(siblings), RolloutArrays.pack(list(chain.from_iterable(siblings.values())))
        answered, arrays = self._ranks.broadcast(answers)
        return arrays.unpack([prompts[index] for index in answered], num_responses=num_responses)

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        answers: dict[int, list[Rollout]],
        on_rollout: Callable[[], None] | None = None,
    ) -> RolloutsUnderWay:
        """Begins a `generate` that goes on while the ranks do something else, updates included.

        answers: siblings of prompts that need not be asked, by their place; on rank 0 it grows with every answer.
        """
        future = None
        if self._servers is not None:
            future = self._servers.start(
                prompts, num_responses=num_responses, seed=seed, answers=answers, on_rollout=on_rollout
            )
        return RolloutsUnderWay(prompts, num_responses, future, self._ranks)

    def sleep(self) -> None:
        """Gives up the GPU memory of all servers, and with it the weights: an update comes next."""
        with self._ranks.share_fate("putting the servers to sleep"):
            if self._servers is not None:
                self._servers.sleep()

    def wake(self, what: Memory) -> None:
        """Takes GPU memory again: first that of the weights, and after an update that of the cache."""
        self._ranks.gather(None)  # each rank has given up its own by now: the servers may be on any of their GPUs
        with self._ranks.share_fate("waking the servers"):
            if self._servers is not None:
                self._servers.wake(what)

    def metrics(self) -> Metrics:
        """What happened to the servers since the run began; empty on all ranks but the first."""
        return self._servers.metrics() if self._servers is not None else {}
