"""Which server answers which request: the responses to one prompt by one server, the least busy one next.

A request is at any moment in exactly one place: waiting, asked of one server, or answered. So none is lost, and none
is answered twice, whatever happens to the servers. Lists of requests are dealt out in turn: those somebody waits for
come first, then the older ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.client import GenerationRequest
from megatron_orz.rollout.servers import RefusedError, ServerError, UnreachableError
from megatron_orz.types import OnAnswer, Rollout

MAX_ATTEMPTS = 3
"""Bad or late answers after which a request is given up. What dies with its server is asked again in any case: no
server dies twice of it, as one that was started anew waits for the next weight update."""

_MAX_CONNECTIONS = 768
"""Requests in flight over all servers: each holds a connection, and a process may often open only 1024 files."""
_POLL_S = 0.25
"""How often the state of the servers is looked at while no answer comes."""
_HOLD_POLL_S = 0.01

_log = logging.getLogger(__name__)


class Asked(Protocol):
    """A server as the router sees it (see `Replica`)."""

    name: str
    reason: str
    num_requests: int
    num_rollouts: int

    @property
    def is_failing(self) -> bool: ...

    def holds(self, version: int) -> bool: ...

    def ask(self, request: GenerationRequest) -> asyncio.Task[list[Rollout]]: ...


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """A request on its way through the servers."""

    index: int
    """Its place in the list."""
    request: GenerationRequest
    tried: list[str] = field(default_factory=list)
    """The servers it failed on."""
    num_failures: int = 0

    def failed(self, server: Asked, error: ServerError) -> None:
        """Notes a failure; raises it when it is one too many."""
        self.tried.append(server.name)
        self.num_failures += not isinstance(error, UnreachableError)
        if self.num_failures == MAX_ATTEMPTS:
            error.add_note(f"It was attempt {MAX_ATTEMPTS} at request {self.request.request_id}.")
            raise error


@dataclass(kw_only=True, slots=True, eq=False)
class _List:
    """The requests of one call."""

    waiting: deque[_Job]
    in_background: bool
    done: asyncio.Queue[asyncio.Task[list[Rollout]] | None] = field(default_factory=asyncio.Queue)
    """Requests that have ended; None only wakes whoever looks for them."""


class Router:
    """Answers lists of requests with servers that come and go, and whose weights change."""

    def __init__(self, servers: Sequence[Asked], *, min_servers: int, max_rollouts_in_flight: int) -> None:
        self._servers = servers
        self._min_servers = min_servers
        self._max_rollouts = max_rollouts_in_flight
        self._max_requests = max(1, _MAX_CONNECTIONS // len(servers))
        self._lists: list[_List] = []
        """In the order in which they are dealt out."""
        self._num_in_flight = 0
        self._is_held = False
        self.on_answer: OnAnswer = lambda siblings: None
        """Called with the rollouts of every request when it is answered."""
        self.version = INITIAL_VERSION
        """Of the weights that a server must hold to be asked."""
        self.num_retries = 0
        """Requests asked again, since the router was made."""

    async def answer(
        self,
        requests: Sequence[GenerationRequest],
        *,
        num_needed: int | None = None,
        answers: dict[int, list[Rollout]] | None = None,
        in_background: bool = False,
        on_rollout: Callable[[], None] | None = None,
    ) -> dict[int, list[Rollout]]:
        """The rollouts of the requests by their place in `requests`, each of the version its server holds when asked.

        num_needed: of the requests, those answered first; the others are dropped. None needs them all.
        answers: rollouts that are there already, by their place; grows with every answer.
        in_background: the requests wait while others do that are not.
        Raises RefusedError at once when a request is wrong, and ServerError when one failed `MAX_ATTEMPTS` times or
        fewer than `min_servers` servers can answer.
        """
        num_needed = len(requests) if num_needed is None else num_needed
        answers = {} if answers is None else answers
        waiting = deque(
            _Job(index=index, request=request) for index, request in enumerate(requests) if index not in answers
        )
        in_flight: dict[asyncio.Task[list[Rollout]], tuple[_Job, Asked]] = {}
        own = self._queue(waiting, in_background=in_background)
        try:
            while len(answers) < num_needed:
                self._check_enough(own)
                while waiting and self._is_turn_of(own) and (server := self._choose(waiting[0])):
                    job = waiting.popleft()
                    task = server.ask(replace(job.request, version=self.version))
                    task.add_done_callback(own.done.put_nowait)
                    in_flight[task] = job, server
                    self._num_in_flight += 1
                    if not waiting:
                        self._wake(but=own)
                ended = await _finished(own.done)
                if ended:
                    self._wake(but=own)
                for task in ended:
                    job, server = in_flight.pop(task)
                    self._num_in_flight -= 1
                    try:
                        answers[job.index] = task.result()
                    except RefusedError:
                        raise
                    except ServerError as error:
                        job.failed(server, error)
                        _log.info("request %s is asked again: %s", job.request.request_id, error)
                        self.num_retries += 1
                        waiting.appendleft(job)
                        continue
                    self.on_answer(answers[job.index])
                    if on_rollout is not None:
                        for _ in task.result():
                            on_rollout()
        finally:
            self._lists.remove(own)
            self._wake()
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
            self._num_in_flight -= len(in_flight)
        return dict(sorted(list(answers.items())[:num_needed]))

    async def hold(self, *, until_answered: bool) -> None:
        """Deals out nothing in the background until `go_on`; until_answered: returns when nothing is in flight."""
        self._is_held = True
        while until_answered and self._num_in_flight:
            await asyncio.sleep(_HOLD_POLL_S)

    def go_on(self, version: int) -> None:
        """Deals out requests again, to servers that hold the weights of `version`."""
        self.version = version
        self._is_held = False
        self._wake()

    def _queue(self, waiting: deque[_Job], *, in_background: bool) -> _List:
        own = _List(waiting=waiting, in_background=in_background)
        self._lists.append(own)
        self._lists.sort(key=lambda other: other.in_background)  # stable: the older ones stay first
        return own

    def _wake(self, *, but: _List | None = None) -> None:
        """Has the others look whether it is their turn, and whether there is room."""
        for other in self._lists:
            if other is not but and other.waiting and other.done.empty():
                other.done.put_nowait(None)

    def _is_turn_of(self, own: _List) -> bool:
        first = next(other for other in self._lists if other.waiting)
        return own is first and not (self._is_held and own.in_background)

    def _choose(self, job: _Job) -> Asked | None:
        """The least busy server with room for the job, those it failed on last; None where there is none."""
        vacant = [
            server
            for server in self._servers
            if server.holds(self.version)
            and server.num_requests < self._max_requests
            # A request for more than the limit is asked alone.
            and (not server.num_rollouts or server.num_rollouts + job.request.num_responses <= self._max_rollouts)
        ]
        return min(vacant, key=lambda server: (job.tried.count(server.name), server.num_rollouts), default=None)

    def _check_enough(self, own: _List) -> None:
        # A server that is failing has a reason in a moment: until then it counts, so that the reason is told. An
        # update, for which the background is held, finds out itself whether there are enough.
        num_left = sum(server.holds(self.version) or server.is_failing for server in self._servers)
        if num_left < self._min_servers and not (self._is_held and own.in_background):
            raise too_few(self._servers, num_left, self._min_servers)


def too_few(servers: Sequence[Asked], num_left: int, min_servers: int) -> ServerError:
    """The error that says why there are not enough servers."""
    reasons = [f"{server.name}: {server.reason}" for server in servers if server.reason]
    return ServerError(
        f"{num_left} of {len(servers)} servers can answer, fewer than fleet.min_servers = {min_servers}; "
        + "\n".join(reasons)
    )


async def _finished(
    done: asyncio.Queue[asyncio.Task[list[Rollout]] | None],
) -> list[asyncio.Task[list[Rollout]]]:
    """The tasks that have ended, as soon as there are some; none after a while, so that servers can be looked at."""
    ended = []
    with suppress(TimeoutError):
        async with asyncio.timeout(_POLL_S):
            ended.append(await done.get())
    while not done.empty():
        ended.append(done.get_nowait())
    return [task for task in ended if task is not None]
