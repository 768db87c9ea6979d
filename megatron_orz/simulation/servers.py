"""Inference servers in simulated time: their running responses share each iteration, and a router deals requests out.

A request is all siblings of a prompt. As in `rollout/router.py`, it goes to the least busy server with room for it, and
is answered when its last sibling is.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import simpy

from megatron_orz.simulation.profile import Decoding

SLACK = 1e-9
"""Tokens by which rounding may let a response seem unfinished."""


class Request:
    """The siblings of one prompt, on their way through a server."""

    def __init__(self, lengths: Sequence[int], on_answer: Callable[[Request], None]) -> None:
        self.lengths = lengths
        self.on_answer = on_answer
        self.num_left = len(lengths)
        self.version = 0
        """Of the weights its first token is sampled from."""


class Server:
    """Decodes running responses together: each gains a token an iteration, whose time depends on how many they are."""

    def __init__(self, env: simpy.Environment, decoding: Decoding) -> None:
        self._env = env
        self._decoding = decoding
        self._running: list[tuple[float, int, Request]] = []
        """(iteration it ends at, order, request): a heap."""
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
        self.num_tokens = 0

    def ask(self, request: Request) -> None:
        """Starts a request, or lets it wait for room."""
        self._settle()
        request.version = self.version
        self.num_rollouts += len(request.lengths)
        self._waiting.extend((length, request) for length in request.lengths)
        self._go_on()

    def pause(self) -> None:
        """Stops decoding; running responses keep their places."""
        self._settle()
        self._paused = True
        self._ticket += 1

    def resume(self) -> None:
        """Goes on where it stopped."""
        self._settle()
        self._paused = False
        self._go_on()

    def abort(self) -> None:
        """Drops all requests."""
        self._settle()
        self._running.clear()
        self._waiting.clear()
        self.num_rollouts = 0
        self._ticket += 1

    def settle(self) -> None:
        """Brings `busy_s` up to the present."""
        self._settle()

    def _settle(self) -> None:
        if self._running and not self._paused:
            elapsed = self._env.now - self._since
            self._iterations += elapsed / self._iteration_s()
            self.busy_s += elapsed
        self._since = self._env.now

    def _iteration_s(self) -> float:
        return self._decoding.seconds(len(self._running)) * self.slowness

    def _go_on(self) -> None:
        """Fills free places, and waits for the response that ends next. Progress must be settled."""
        while self._waiting and len(self._running) < self._decoding.max_running:
            length, request = self._waiting.popleft()
            self._num_started += 1
            self.num_tokens += length
            heapq.heappush(self._running, (self._iterations + length, self._num_started, request))
        self._ticket += 1
        if self._running and not self._paused:
            left = max(0.0, self._running[0][0] - self._iterations)
            end = self._env.timeout(left * self._iteration_s())
            assert end.callbacks is not None
            end.callbacks.append(partial(self._end_responses, self._ticket))

    def _end_responses(self, ticket: int, end: simpy.Event) -> None:
        if ticket != self._ticket:
            return  # something has changed since: another end is awaited
        self._settle()
        answered = []
        while self._running and self._running[0][0] <= self._iterations + SLACK:
            _, _, request = heapq.heappop(self._running)
            request.num_left -= 1
            if request.num_left == 0:
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

    def update(self, version: int, sync_s: float, slownesses: Sequence[float]) -> simpy.events.ProcessGenerator:
        """A weight update: no server decodes meanwhile, and each goes on at a speed of its own."""
        for server in self.servers:
            server.pause()
        yield self.env.timeout(sync_s)
        for server, slowness in zip(self.servers, slownesses, strict=True):
            server.slowness = slowness
            server.version = version
            server.resume()

    def busy_s(self) -> float:
        """Of all servers up to the present, while at least one response ran."""
        for server in self.servers:
            server.settle()
        return sum(server.busy_s for server in self.servers)

    def _on_answer(self, batch: Batch, request: Request) -> None:
        batch.answers.append(request)
        if len(batch.answers) == batch.num_needed:
            batch.is_answered.succeed()
        self._deal()

    def _deal(self) -> None:
        while self._queue:
            size = len(self._queue[0].lengths)
            vacant = [s for s in self.servers if not s.num_rollouts or s.num_rollouts + size <= self._max_rollouts]
            if not vacant:
                return
            min(vacant, key=lambda server: server.num_rollouts).ask(self._queue.popleft())


def generation_seconds(decoding: Decoding, groups: Sequence[Sequence[int]], *, num_servers: int) -> float:
    """From the first request to the last answer, when all are asked at once and nothing is asked beside them."""
    env = simpy.Environment()
    in_flight = sum(map(len, groups))
    fleet = SimulatedFleet(env, decoding, num_servers=num_servers, max_rollouts_in_flight=in_flight)
    env.run(until=fleet.ask(groups, num_needed=len(groups)).is_answered)
    return float(env.now)
