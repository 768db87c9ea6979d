"""New weights from every pipeline stage: its first rank sends them to all servers, so that none crosses the pipeline.

rank 0                      asks the servers, sends its stage's weights, ends the update when all have sent
first rank of a stage       sends its stage's weights, over a group of its own with all workers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch

from megatron_orz.config import Verification
from megatron_orz.ranks import Ranks
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.meeting import Meeting
from megatron_orz.rollout.rank_senders import RankSenders
from megatron_orz.rollout.receiving import Offer
from megatron_orz.rollout.server_group import Sender
from megatron_orz.rollout.transport import Transport, WeightStream
from megatron_orz.rollout.waiting import Deadline, first_error, in_background
from megatron_orz.rollout.weight_sender import WeightSender
from megatron_orz.types import Metrics, NamedWeights, RepeatableWeights


class StageSender:
    """Sends a part of the weights in the updates that a `WeightSender` of another rank leads.

    offer: of that `WeightSender`. sender: which part, from 1. verification: as the other's.
    """

    def __init__(self, transport: Transport, offer: Offer, sender: int, *, verification: Verification) -> None:
        self._transport = transport
        self._offer = offer
        self._sender = sender
        self._verification: Verification = verification
        self._meeting: Meeting | None = None
        self._stream: WeightStream | None = None

    def connect(self) -> None:
        """Joins the other senders and all workers. Raises RuntimeError."""
        offer, deadline = self._offer, Deadline(self._offer.timeout_s)
        self._meeting = Meeting.join(
            offer.address, offer.port, num_workers=offer.num_workers, timeout_s=offer.timeout_s
        ).of(self._sender)
        with self._meeting.sharing_fate():
            check = partial(_check, self._meeting, deadline)
            joining = in_background(partial(self._transport.connect, self._meeting.of(self._sender)))
            first_error([joining], check)
            dtype: torch.dtype = getattr(torch, self._meeting.learn(f"dtype/{self._sender}", check))
            self._stream = WeightStream(
                self._transport, self._meeting, dtype, verification=self._verification, delta=offer.delta
            )

    def send(self, weights: NamedWeights, version: int) -> None:
        """Returns when the update that the other leads has succeeded. Raises RuntimeError."""
        assert self._meeting is not None, "connect comes first"
        assert self._stream is not None
        with self._meeting.sharing_fate():
            check = partial(_check, self._meeting, Deadline(self._offer.timeout_s))
            sent = self._stream.send(weights, self._stream.begin(), check)
            self._meeting.tell(f"sent/{self._sender}", asdict(sent))
            self._stream.drain(check)
            self._meeting.learn(f"end/{self._sender}", check)
            self._stream.commit(version)

    def metrics(self) -> Metrics:
        """None: those of all senders are the leader's."""
        return {}

    def close(self) -> None:
        """Leaves the workers."""
        self._transport.close()
        self._meeting = self._stream = None


def _check(meeting: Meeting, deadline: Deadline) -> None:
    deadline.remaining_s()
    meeting.check_others()


class StageSenders(RankSenders[Offer]):
    """The senders of all stages. A rank that sends is told where to meet rank 0 and the workers.

    leader: the sender of rank 0 to some servers. follower: that of another stage to the same ones.
    first_ranks: of every stage, in their order.
    """

    def __init__(
        self,
        leader: Callable[[Sequence[ServerClient]], WeightSender],
        follower: Callable[[Offer, int], StageSender],
        *,
        first_ranks: Sequence[int],
        ranks: Ranks,
    ) -> None:
        super().__init__(ranks)
        self._build_leader = leader
        self._build_follower = follower
        self._first_ranks = first_ranks
        self._leader: WeightSender | None = None

    def share(self, weights: RepeatableWeights) -> RepeatableWeights:
        """Those of this rank's stage."""
        return weights.of_stage()

    def _invite(self, clients: Sequence[ServerClient]) -> Mapping[int, Offer]:
        self._leader = self._build_leader(clients)
        return dict.fromkeys(self._first_ranks, self._leader.invite())

    def _accept(self, invitation: Offer) -> Sender:
        sender = self._leader or self._build_follower(invitation, self._first_ranks.index(self._ranks.rank))
        self._sender = sender  # left with the others, also where it cannot join
        sender.connect()
        return sender
