"""One server of a fleet: asked, watched, and started anew when it fails. Everything happens in the fleet's event loop.

    starting --> up --> down --> starting ...
                         \\--> lost, when it has failed too often in a row

Only a server that is up and holds the current weights is asked. One that was started anew holds the weights of the
model directory, and waits for the next update.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any, Literal, TypeAlias

import httpx

from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.client import GenerationRequest, ServerClient
from megatron_orz.rollout.servers import DeadlineError, RefusedError, ServerError, ServerProcess, UnreachableError
from megatron_orz.types import Rollout

Phase: TypeAlias = Literal["starting", "up", "down", "lost"]

_HEARTBEAT_S = 2.0
_RESTART_DELAYS_S = (0.0, 2.0, 10.0, 30.0, 60.0)
_MAX_BAD_ANSWERS = 3
"""Bad answers in a row after which a server is given up, though it lives."""
_DEATH_WAIT_S = 2.0
"""How long a server whose connection broke is given to end, so that the reason can say that it has."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A server that may be talked to, and its process where this run started it."""

    client: ServerClient
    process: ServerProcess | None

    def wait_until_healthy(self) -> None:
        """Returns when the server answers. Raises ServerError when it ends, or takes too long."""
        if self.process is not None:
            self.process.wait_until_healthy()
            self.client.set_version(INITIAL_VERSION)

    def check_alive(self, *, wait_s: float = 0.0) -> None:
        """Raises ServerError with the end of the log when the process has ended, or ends within `wait_s`."""
        if self.process is not None:
            self.process.check_alive(wait_s=wait_s)

    def close(self) -> None:
        """Ends the process, where there is one."""
        self.client.close()
        if self.process is not None:
            self.process.close()


class Replica:
    """A server that is kept running.

    run: starts the server, or finds it; called again for each restart with their number so far.
    has_memory: set while the server may be started.
    heartbeat_timeout_s, stuck_timeout_s: see FleetConfig.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[int], Running],
        *,
        http: httpx.AsyncClient,
        has_memory: asyncio.Event,
        heartbeat_timeout_s: float,
        stuck_timeout_s: float,
    ) -> None:
        self.name = name
        self.phase: Phase = "starting"
        self.reason = ""
        """Why the server failed last."""
        self.version: int | None = None
        """The policy version of the weights the server holds; None where that is unknown."""
        self.is_updating = False
        """New weights are on their way: the server computes nothing, and its version is about to change."""
        self.num_restarts = 0
        self.num_requests = 0
        """Requests asked and not answered."""
        self.num_rollouts = 0
        """Rollouts of these requests."""
        self._run = run
        self._http = http
        self._has_memory = has_memory
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._stuck_timeout_s = stuck_timeout_s
        self._running: Running | None = None
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._suspicion = asyncio.Event()
        self._num_bad_answers = 0
        self._num_failures = 0  # since the last weight update

    @property
    def client(self) -> ServerClient:
        """The client of the server that runs at the moment."""
        assert self._running is not None, "not started"
        return self._running.client

    @property
    def is_up(self) -> bool:
        """The server may be talked to."""
        return self.phase == "up" and not self._failure.done()

    @property
    def is_failing(self) -> bool:
        """The server has just failed: `reason` is about to be known."""
        return self.phase == "up" and self._failure.done()

    @property
    def is_ours(self) -> bool:
        """This run started the server, and can start it anew."""
        return self._running is not None and self._running.process is not None

    def holds(self, version: int) -> bool:
        """Whether the server may be asked for rollouts of `version`."""
        return self.is_up and self.version == version

    async def start(self) -> None:
        """Starts the server; returns when it answers. Raises ValueError for what cannot start, and ServerError."""
        self.phase = "starting"
        self._running = self._run(self.num_restarts)
        await asyncio.to_thread(self._running.wait_until_healthy)
        # Nobody knows which weights a server of somebody else holds, unless it has kept those it got from this run.
        if self.is_ours:
            self.version = INITIAL_VERSION
        elif await self.client.served_version(self._http) != str(self.version):
            self.version = None
        self._failure = asyncio.get_running_loop().create_future()
        self._num_bad_answers = 0
        self.is_updating = False
        self.phase = "up"

    async def keep(self) -> None:
        """Watches the started server, and starts it anew whenever it fails, until it has failed too often."""
        try:
            await self._start_anew_while_hopeful()
        except (OSError, ValueError, SubprocessError) as error:  # of its processes, or its node
            self.reason = f"its watch failed: {error!r}"
        finally:  # nobody may wait for a server that nobody starts anew
            self.phase = "lost"
        _log.error("%s failed for good: %s", self.name, self.reason)

    def ask(self, request: GenerationRequest) -> asyncio.Task[list[Rollout]]:
        """The rollouts of a request, which counts from this moment until they are there.

        The task raises ServerError, also as soon as the server fails in another way.
        """
        self.num_requests += 1
        self.num_rollouts += request.num_responses
        task = asyncio.create_task(self._respond(request, self._failure))
        task.add_done_callback(lambda _: self._forget(request))
        return task

    async def is_well(self) -> bool:
        """Whether the server answers at this moment; a suspicion is looked into by the watch."""
        try:
            await self.client.num_computed(self._http, timeout_s=self._heartbeat_timeout_s)
        except ServerError:
            self._suspicion.set()
            return False
        return True

    async def has_died(self) -> bool:
        """Whether the server has ended, is about to, or says of itself that it has failed.

        A server whose engine has died answers for a while longer, with errors.
        """
        assert self._running is not None
        try:
            await asyncio.to_thread(self._running.check_alive, wait_s=_DEATH_WAIT_S)
            await self.client.check_health(self._http, timeout_s=self._heartbeat_timeout_s)
        except ServerError:
            self._suspicion.set()
            return True
        return not await self.is_well()

    async def drop_requests(self) -> None:
        """Ends all requests the server still works on."""
        try:
            await self.client.drop_requests(self._http)
        except ServerError:
            self._suspicion.set()

    def fail(self, reason: str, *, is_final: bool = False) -> None:
        """Gives the server up: it is stopped, and started anew unless the failure is final."""
        if is_final:
            self._num_failures = len(_RESTART_DELAYS_S)
        self.is_updating = False
        if not self._failure.done():
            self._failure.set_result(reason)

    def updated(self, version: int) -> None:
        """The server holds the weights of `version`, and has thereby shown that it works."""
        self.version = version
        self.is_updating = False
        self._num_failures = 0

    async def close(self) -> None:
        """Ends the server; `keep` has been cancelled."""
        self.phase = "lost"
        if self._running is not None:
            await asyncio.to_thread(self._running.close)

    async def _respond(self, request: GenerationRequest, failure: asyncio.Future[str]) -> list[Rollout]:
        answer = asyncio.ensure_future(self.client.respond(self._http, request))
        either: set[asyncio.Future[Any]] = {answer, failure}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise UnreachableError(f"{self.name} failed meanwhile: {failure.result()}")
            rollouts = answer.result()
        except (RefusedError, DeadlineError):
            raise  # a request's own fault, or perhaps so: a server that is stuck is found by the watch
        except ServerError as error:
            self._num_bad_answers += 1
            self._suspicion.set()
            if self._num_bad_answers >= _MAX_BAD_ANSWERS and failure is self._failure:
                self.fail(f"{self._num_bad_answers} requests in a row failed, the last one thus: {error}")
            raise
        else:
            self._num_bad_answers = 0
            return rollouts
        finally:
            answer.cancel()

    def _forget(self, request: GenerationRequest) -> None:
        self.num_requests -= 1
        self.num_rollouts -= request.num_responses

    async def _start_anew_while_hopeful(self) -> None:
        while True:
            if self.phase == "up":
                self.reason = await self._watched()
            await self._stop()
            if self._num_failures == len(_RESTART_DELAYS_S):
                break
            delay_s = _RESTART_DELAYS_S[self._num_failures]
            self._num_failures += 1
            self.phase = "down"
            _log.warning("%s failed and is started anew in %g s: %s", self.name, delay_s, self.reason)
            await asyncio.sleep(delay_s)
            await self._has_memory.wait()
            self.num_restarts += 1
            try:
                await self.start()
                _log.warning("%s is up again, and waits for the next weight update", self.name)
            except (ServerError, ValueError, OSError) as error:
                self.reason = str(error)

    async def _watched(self) -> str:
        """Returns when the server has failed, with the reason."""
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({watch, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            self.fail(watch.result() if watch.done() else "")
        finally:
            watch.cancel()
        assert self._running is not None
        try:  # a process that has ended says more than a broken connection
            await asyncio.to_thread(self._running.check_alive, wait_s=_DEATH_WAIT_S)
        except ServerError as error:
            return str(error)
        return self._failure.result()

    async def _watch(self) -> str:
        last, since = -1.0, time.monotonic()
        num_misses = 0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_S):
                    await self._suspicion.wait()
            self._suspicion.clear()
            assert self._running is not None
            try:
                await asyncio.to_thread(self._running.check_alive)
            except ServerError as error:
                return str(error)
            try:
                computed = await self.client.num_computed(self._http, timeout_s=self._heartbeat_timeout_s)
            except ServerError as error:
                num_misses += 1
                if num_misses == 2 or isinstance(error, DeadlineError):
                    return str(error)
                continue
            num_misses = 0
            if computed != last or not self.num_requests or self.is_updating:
                last, since = computed, time.monotonic()
            elif time.monotonic() - since > self._stuck_timeout_s:
                return (
                    f"it computed no token within fleet.stuck_timeout_s = {self._stuck_timeout_s:g} s, "
                    f"although {self.num_rollouts} rollouts were asked of it"
                )

    async def _stop(self) -> None:
        assert self._running is not None
        await asyncio.to_thread(self._running.close)
