"""Inference servers in simulated time: their running responses share each iteration, and a router deals requests out.

A request is all siblings of a prompt. As in `rollout/router.py`, it goes to the least busy server with room for it, and
is answered when its last sibling is.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import simpy
from numpy.typing import NDArray

from megatron_orz.simulation.profile import Decoding

SLACK = 1e-9
"""Iterations by which rounding may let a response seem unfinished."""


class Request:
    """The siblings of one prompt, on their way through a server."""

    def __init__(self, lengths: Sequence[int], on_answer: Callable[[Request], None]) -> None:
        self.lengths = lengths
        self.on_answer = on_answer
        self.num_waiting = len(lengths)
        self.last_end = 0.0
        """Iteration at which the last of its started siblings ends."""
        self.version = 0
        """Of the weights its first token is sampled from."""


class Server:
    """Decodes running responses together: each gains a token an iteration, whose time depends on how many they are.

    An end of a response is an event only where it ends a whole request, or where others wait for its place: the ends
    between two events are passed over.
    """

    def __init__(self, env: simpy.Environment, decoding: Decoding) -> None:
        self._env = env
        self._decoding = decoding
        self._ends: NDArray[np.float64] = np.empty(0)
        """Iterations at which running responses end, in order."""
        self._times: NDArray[np.float64] = np.empty(0)
        """Seconds from `_since` to each of them."""
        self._requests: list[tuple[float, int, Request]] = []
        """(iteration it ends at, order, request) of those that run whole: a heap."""
        self._waiting: deque[tuple[int, Request]] = deque()
        self._iterations = 0.0
        self._since = env.now
        self._paused = False
        self._ticket = 0
        self._num_started = 0
        self.slowness = 1.0
        """Seconds an iteration takes, over those expected of it."""
        self.version = 0
        self.num_rollouts = 0
        """Asked of it in requests that are not answered yet."""
        self.busy_s = 0.0

    def ask(self, request: Request) -> None:
        """Starts a request, or lets it wait for room."""
        self.settle()
        request.version = self.version
        self.num_rollouts += len(request.lengths)
        self._waiting.extend((length, request) for length in request.lengths)
        self._go_on()

    def pause(self) -> None:
        """Stops decoding; running responses keep their places."""
        self.settle()
        self._paused = True
        self._ticket += 1

    def resume(self) -> None:
        """Goes on where it stopped."""
        self.settle()
        self._paused = False
        self._go_on()

    def abort(self) -> None:
        """Drops all requests."""
        self.settle()
        self._ends = self._times = np.empty(0)
        self._requests.clear()
        self._waiting.clear()
        self.num_rollouts = 0
        self._ticket += 1

    def settle(self) -> None:
        """Brings progress and `busy_s` up to the present."""
        elapsed, self._since = self._env.now - self._since, self._env.now
        if self._paused or not len(self._ends) or elapsed == 0:
            return
        self.busy_s += min(elapsed, float(self._times[-1]))
        num_over = int(np.searchsorted(self._times, elapsed, side="right"))
        if num_over:
            self._iterations = float(self._ends[num_over - 1])
            elapsed -= float(self._times[num_over - 1])
        if num_over < len(self._ends):
            self._iterations += elapsed / self._iteration_s(len(self._ends) - num_over)
        self._forget(num_over)

    def _iteration_s(self, num_running: int) -> float:
        return self._decoding.seconds(num_running) * self.slowness

    def _forget(self, num_over: int) -> None:
        self._ends = self._ends[num_over:]
        self._time_ends()

    def _time_ends(self) -> None:
        """From one end to the next, one response fewer is running."""
        num_running = np.arange(len(self._ends), 0, -1)
        per_iteration = (self._decoding.iteration_s + num_running * self._decoding.response_s) * self.slowness
        steps = np.diff(self._ends, prepend=self._iterations)
        self._times = np.cumsum(np.maximum(steps, 0.0) * per_iteration)

    def _go_on(self) -> None:
        """Fills free places, and waits for what ends next. Progress must be settled."""
        started: list[float] = []
        while self._waiting and len(self._ends) + len(started) < self._decoding.max_running:
            length, request = self._waiting.popleft()
            end = self._iterations + length
            started.append(end)
            request.num_waiting -= 1
            request.last_end = max(request.last_end, end)
            if request.num_waiting == 0:
                self._num_started += 1
                heapq.heappush(self._requests, (request.last_end, self._num_started, request))
        if started:
            self._ends = np.sort(np.concatenate([self._ends, started]))
        self._time_ends()
        self._ticket += 1
        if self._paused or not (len(self._ends) or self._requests):
            return
        upcoming = [self._requests[0][0]] if self._requests else []
        if self._waiting:
            upcoming.append(float(self._ends[0]))
        place = int(np.searchsorted(self._ends, min(upcoming) - SLACK))
        wait = float(self._times[place]) if place < len(self._ends) else 0.0
        event = self._env.timeout(wait)
        assert event.callbacks is not None
        event.callbacks.append(partial(self._reach, self._ticket, min(upcoming)))

    def _reach(self, ticket: int, iterations: float, event: simpy.Event) -> None:
        """The iteration at which something ends."""
        if ticket != self._ticket:
            return  # something has changed since: another end is awaited
        self.settle()
        self._iterations = max(self._iterations, iterations)
        self._forget(int(np.searchsorted(self._ends, self._iterations + SLACK, side="right")))
        answered = []
        while self._requests and self._requests[0][0] <= self._iterations + SLACK:
            _, _, request = heapq.heappop(self._requests)
            self.num_rollouts -= len(request.lengths)
            answered.append(request)
        self._go_on()
        for request in answered:
            request.on_answer(request)


class Batch:
    """The requests of one step, in the order of their answers."""

    def __init__(self, env: simpy.Environment, num_needed: int) -> None:
        self.num_needed = num_needed
        self.answers: list[Request] = []
        self.is_answered = env.event()


class SimulatedFleet:
    """Servers behind a router."""

    def __init__(
        self, env: simpy.Environment, decoding: Decoding, *, num_servers: int, max_rollouts_in_flight: int
    ) -> None:
        self.env = env
        self.servers = [Server(env, decoding) for _ in range(num_servers)]
        self._max_rollouts = max_rollouts_in_flight
        self._queue: deque[Request] = deque()
        self._is_held = False
        self._has_ended = env.event()
        """Of any request."""

    def ask(self, groups: Sequence[Sequence[int]], *, num_needed: int) -> Batch:
        """Asks for the responses to some prompts; the batch is answered with the first `num_needed` of them."""
        batch = Batch(self.env, num_needed)
        self._queue.extend(Request(lengths, partial(self._on_answer, batch)) for lengths in groups)
        self._deal()
        return batch

    def abort(self) -> None:
        """Drops whatever is not answered."""
        self._queue.clear()
        for server in self.servers:
            server.abort()

    def drain(self) -> simpy.events.ProcessGenerator:
        """Asks servers for nothing until the next update is over, and waits until they have answered everything."""
        self._is_held = True
        while any(server.num_rollouts for server in self.servers):
            yield self._has_ended

    def update(self, version: int, sync_s: float, slownesses: Sequence[float]) -> simpy.events.ProcessGenerator:
        """A weight update: no server decodes meanwhile, and each goes on at a speed of its own."""
        for server in self.servers:
            server.pause()
        yield self.env.timeout(sync_s)
        for server, slowness in zip(self.servers, slownesses, strict=True):
            server.slowness = slowness
            server.version = version
            server.resume()
        self._is_held = False
        self._deal()

    def busy_s(self) -> float:
        """Of all servers up to the present, while at least one response ran."""
        for server in self.servers:
            server.settle()
        return sum(server.busy_s for server in self.servers)

    def _on_answer(self, batch: Batch, request: Request) -> None:
        batch.answers.append(request)
        if len(batch.answers) == batch.num_needed:
            batch.is_answered.succeed()
        self._has_ended.succeed()
        self._has_ended = self.env.event()
        self._deal()

    def _deal(self) -> None:
        while self._queue and not self._is_held:
            size = len(self._queue[0].lengths)
            vacant = [s for s in self.servers if not s.num_rollouts or s.num_rollouts + size <= self._max_rollouts]
            if not vacant:
                return
            min(vacant, key=lambda server: server.num_rollouts).ask(self._queue.popleft())


def generation_seconds(
    decoding: Decoding,
    groups: Sequence[Sequence[int]],
    *,
    num_servers: int,
    not_needed: Sequence[Sequence[int]] = (),
) -> float:
    """From the first request to the last answer, when all are asked at once.

    not_needed: asked after them, and not waited for.
    """
    env = simpy.Environment()
    in_flight = sum(map(len, [*groups, *not_needed]))
    fleet = SimulatedFleet(env, decoding, num_servers=num_servers, max_rollouts_in_flight=in_flight)
    batch = fleet.ask(groups, num_needed=len(groups))
    fleet.ask(not_needed, num_needed=len(not_needed))
    env.run(until=batch.is_answered)
    return float(env.now)
