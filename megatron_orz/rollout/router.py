"""Which server answers which request: the responses to one prompt by one server, the least busy one next.

A request is at any moment in exactly one place: waiting, asked of one server, or answered. So none is lost, and none
is answered twice, whatever happens to the servers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from megatron_orz.rollout.client import GenerationRequest
from megatron_orz.rollout.servers import RefusedError, ServerError, UnreachableError
from megatron_orz.types import Rollout

MAX_ATTEMPTS = 3
"""Bad or late answers after which a request is given up. What dies with its server is asked again in any case: no
server dies twice of it, as one that was started anew waits for the next weight update."""

_MAX_CONNECTIONS = 768
"""Requests in flight over all servers: each holds a connection, and a process may often open only 1024 files."""
_POLL_S = 0.25
"""How often the state of the servers is looked at while no answer comes."""

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

    async def ask(self, request: GenerationRequest) -> list[Rollout]: ...


@dataclass(kw_only=True, slots=True)
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


class Router:
    """Answers lists of requests with servers that come and go."""

    def __init__(self, servers: Sequence[Asked], *, min_servers: int, max_rollouts_in_flight: int) -> None:
        self._servers = servers
        self._min_servers = min_servers
        self._max_rollouts = max_rollouts_in_flight
        self._max_requests = max(1, _MAX_CONNECTIONS // len(servers))
        self.num_retries = 0
        """Requests asked again, since the router was made."""

    async def answer(
        self,
        requests: Sequence[GenerationRequest],
        *,
        num_needed: int | None = None,
        on_rollout: Callable[[], None] | None = None,
    ) -> dict[int, list[Rollout]]:
        """The rollouts of the requests, all of one policy version, by their place in `requests`.

        num_needed: of the requests, those answered first; the others are dropped. None needs them all.
        Raises RefusedError at once when a request is wrong, and ServerError when one failed `MAX_ATTEMPTS` times or
        fewer than `min_servers` servers can answer.
        """
        num_needed = len(requests) if num_needed is None else num_needed
        waiting = deque(_Job(index=index, request=request) for index, request in enumerate(requests))
        in_flight: dict[asyncio.Task[list[Rollout]], tuple[_Job, Asked]] = {}
        done: asyncio.Queue[asyncio.Task[list[Rollout]]] = asyncio.Queue()
        answers: dict[int, list[Rollout]] = {}
        try:
            while len(answers) < num_needed:
                self._check_enough(requests[0].version)
                while waiting and (server := self._choose(waiting[0])):
                    job = waiting.popleft()
                    task = asyncio.create_task(server.ask(job.request))
                    task.add_done_callback(done.put_nowait)
                    in_flight[task] = job, server
                    await asyncio.sleep(0)  # the server counts the request before the next one is dealt out
                for task in await _finished(done):
                    job, server = in_flight.pop(task)
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
                    if on_rollout is not None:
                        for _ in task.result():
                            on_rollout()
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
        return dict(sorted(list(answers.items())[:num_needed]))

    def _choose(self, job: _Job) -> Asked | None:
        """The least busy server with room for the job, those it failed on last; None where there is none."""
        vacant = [
            server
            for server in self._servers
            if server.holds(job.request.version)
            and server.num_requests < self._max_requests
            # A request for more than the limit is asked alone.
            and (not server.num_rollouts or server.num_rollouts + job.request.num_responses <= self._max_rollouts)
        ]
        return min(vacant, key=lambda server: (job.tried.count(server.name), server.num_rollouts), default=None)

    def _check_enough(self, version: int) -> None:
        # A server that is failing has a reason in a moment: until then it counts, so that the reason is told.
        num_left = sum(server.holds(version) or server.is_failing for server in self._servers)
        if num_left < self._min_servers:
            raise too_few(self._servers, num_left, self._min_servers)


def too_few(servers: Sequence[Asked], num_left: int, min_servers: int) -> ServerError:
    """The error that says why there are not enough servers."""
    reasons = [f"{server.name}: {server.reason}" for server in servers if server.reason]
    return ServerError(
        f"{num_left} of {len(servers)} servers can answer, fewer than fleet.min_servers = {min_servers}; "
        + "\n".join(reasons)
    )


async def _finished(
    done: asyncio.Queue[asyncio.Task[list[Rollout]]],
) -> list[asyncio.Task[list[Rollout]]]:
    """The tasks that have ended, as soon as there are some; none after a while, so that servers can be looked at."""
    tasks = []
    with suppress(TimeoutError):
        tasks.append(await asyncio.wait_for(done.get(), _POLL_S))
    while not done.empty():
        tasks.append(done.get_nowait())
    return tasks
