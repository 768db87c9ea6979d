"""The servers of a fleet, as rank 0 sees them: opened together, updated together, asked as one.

Everything about the servers happens in one event loop, on a thread of its own that lives as long as the fleet: they are
watched and started anew while the trainer trains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.rollout.client import LIMITS, GenerationRequest, Memory, ServerClient
from megatron_orz.rollout.replica import Replica, Running
from megatron_orz.rollout.router import Router, too_few
from megatron_orz.rollout.sampling import prompt_seed
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.token import authorization
from megatron_orz.types import Metrics, NamedWeights, OnAnswer, Prompt, Rollout

_POLL_S = 0.25

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """Brings new weights to the servers it was made for."""

    def send(self, weights: NamedWeights, version: int) -> None:
        """All servers hold the weights of `version` afterwards, or none is of use any more: raises RuntimeError."""
        ...

    def metrics(self) -> Metrics:
        """Of the last update."""
        ...

    def close(self) -> None:
        """Leaves the servers."""
        ...


class ServersLostError(ServerError):
    """Servers died during a weight update, which left the others with half of it."""


class ServerGroup:
    """Several servers with the same weights. Its methods are called on the trainer's thread, and block."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        sampling: SamplingConfig,
        fleet: FleetConfig,
        *,
        http: httpx.AsyncClient,
        portal: BlockingPortal,
        has_memory: asyncio.Event,
        connect: Callable[[Sequence[ServerClient]], Sender],
    ) -> None:
        """has_memory: set while servers may be started. connect: joins the trainer and servers for weight updates."""
        self._replicas = replicas
        self._sampling = sampling
        self._min_servers = fleet.min_servers
        self._swaps_within = fleet.swaps_within_responses
        self._http = http
        self._portal = portal
        self._has_memory = has_memory
        self._connect = connect
        self._router = Router(
            replicas, min_servers=fleet.min_servers, max_rollouts_in_flight=fleet.max_rollouts_in_flight
        )
        self._sender: tuple[list[ServerClient], Sender] | None = None
        self._waits_for_all = False
        self._under_way: set[Future[Any]] = set()
        self._in_order = asyncio.Lock()

    def listen(self, on_answer: OnAnswer) -> None:
        """Has `on_answer` called with the siblings of every prompt when it is answered, in the fleet's thread."""
        self._router.on_answer = on_answer

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """New weights for every server that is up. Requests that wait go out to the new weights; what was asked already
        is waited for, or goes on with the new weights (`fleet.swaps_within_responses`).

        An update that fails midway leaves all its servers with neither the old nor the new weights, so that they are
        started anew. Raises ServersLostError when one of them died of it: the update can be repeated, and the next one
        waits for all. What fails though every server lives would fail again, and is raised as it is.
        """
        self._portal.call(partial(self._router.hold, until_answered=not self._swaps_within))
        replicas = self._portal.call(self._ready)
        clients = [replica.client for replica in replicas]
        try:
            sender = self._sender_to(clients)
            for replica in replicas:
                replica.is_updating = True
            sender.send(weights, version)
        except RuntimeError as error:
            self._drop_sender()
            have_died = self._portal.call(self._have_died, _not_started_anew(replicas, clients))
            same = self._portal.call(self._give_up, replicas, clients, f"a weight update failed: {error}")
            has_died = any(have_died) or len(same) < len(replicas)
            self._waits_for_all = True
            if has_died:
                raise ServersLostError(f"servers died during the update to version {version}: {error}") from error
            raise
        self._waits_for_all = False
        self._portal.call(self._updated, replicas, clients, version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        num_groups: int | None = None,
        on_rollout: Callable[[], None] | None = None,
    ) -> dict[int, list[Rollout]]:
        """The siblings of every prompt by its place, in order, of the weights that the servers hold.

        num_groups: of the prompts, those answered first; None: all of them.
        """
        requests = self._requests(prompts, num_responses, seed)
        return self._portal.start_task_soon(self._answer, requests, num_groups, None, False, on_rollout).result()

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        answers: dict[int, list[Rollout]],
        on_rollout: Callable[[], None] | None = None,
    ) -> Future[dict[int, list[Rollout]]]:
        """A `generate` that goes on while the caller does something else, updates included; a `generate` goes before.

        answers: siblings of prompts that need not be asked, by their place; grows with every answer.
        """
        requests = self._requests(prompts, num_responses, seed)
        future = self._portal.start_task_soon(self._answer, requests, None, answers, True, on_rollout)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def sleep(self) -> None:
        """Gives up the GPU memory of all servers, and with it the weights. No server is started anew until `wake`."""
        self._portal.call(self._sleep)

    def wake(self, what: Memory) -> None:
        """Takes GPU memory again: first that of the weights, and after an update that of the cache."""
        self._portal.call(self._on_all, lambda client: client.wake(self._http, what))
        if what == "kv_cache":
            self._portal.call(self._has_memory.set)

    def metrics(self) -> Metrics:
        """What happened to the servers since the run began, and the last weight update."""
        return (self._sender[1].metrics() if self._sender is not None else {}) | {
            "fleet/servers_up": float(sum(replica.is_up for replica in self._replicas)),
            "fleet/restarts": float(sum(replica.num_restarts for replica in self._replicas)),
            "fleet/retried_requests": float(self._router.num_retries),
        }

    def close(self) -> None:
        """Leaves the servers, and what they were asked; what runs is ended by `open_group`."""
        for future in list(self._under_way):
            future.cancel()
        self._drop_sender()

    def _requests(self, prompts: Sequence[Prompt], num_responses: int, seed: int) -> list[GenerationRequest]:
        version = self._router.version
        return [
            GenerationRequest(
                request_id=f"v{version}-s{seed}-p{index}",
                prompt=prompt,
                num_responses=num_responses,
                seed=prompt_seed(seed, index),
                sampling=self._sampling,
                version=version,
            )
            for index, prompt in enumerate(prompts)
        ]

    async def _answer(
        self,
        requests: Sequence[GenerationRequest],
        num_groups: int | None,
        answers: dict[int, list[Rollout]] | None,
        in_background: bool,
        on_rollout: Callable[[], None] | None,
    ) -> dict[int, list[Rollout]]:
        if not requests:
            return {}
        async with self._in_order:
            await self._check_versions()
        # Nothing is awaited from here until the router has put the requests behind those that came before.
        answered = await self._router.answer(
            requests, num_needed=num_groups, answers=answers, in_background=in_background, on_rollout=on_rollout
        )
        await self._check_versions()
        if len(answered) < len(requests):
            # A server notices at some time that nobody waits for an answer; nothing may be left at the next update.
            await asyncio.gather(*(replica.drop_requests() for replica in self._replicas if replica.is_up))
        return answered

    async def _check_versions(self) -> None:
        """Raises ServerError when a server holds other weights than it was given."""

        async def check(replica: Replica) -> None:
            version = replica.version
            try:
                served = await replica.client.served_version(self._http)
            except ServerError:
                await replica.is_well()  # a server that does not answer is the watch's business
                return
            if replica.version == version and not replica.is_updating and served != str(version):
                raise ServerError(
                    f"the server at {replica.client.url} holds weights of version {served}, not {version}; "
                    "only this run's update_weights may change them"
                )

        await asyncio.gather(*(check(replica) for replica in self._replicas if replica.holds(self._router.version)))

    async def _ready(self) -> list[Replica]:
        """The servers that take part in an update: all that are up, at least `min_servers`.

        After an update that failed, all servers that still start are waited for: the others of the group were started
        anew with the one that died.
        """
        while True:
            up = [replica for replica in self._replicas if replica.is_up]
            # Without memory, what is down stays down.
            hopeless = ("lost",) if self._has_memory.is_set() else ("lost", "down")
            hopeful = [replica for replica in self._replicas if replica.phase not in hopeless]
            if len(hopeful) < self._min_servers:
                raise too_few(self._replicas, len(hopeful), self._min_servers)
            is_enough = len(up) == len(hopeful) if self._waits_for_all else len(up) >= self._min_servers
            if is_enough and all(await self._are_well(up)):
                return up
            await asyncio.sleep(_POLL_S)

    async def _sleep(self) -> None:
        # One that is starting takes its memory now, and could not be put to sleep before it has it all.
        self._has_memory.clear()
        while any(replica.phase == "starting" for replica in self._replicas):
            await asyncio.sleep(_POLL_S)
        await self._on_all(lambda client: client.sleep(self._http))
        # One that has failed keeps its memory until its processes have ended.
        while any(replica.is_failing for replica in self._replicas):
            await asyncio.sleep(_POLL_S)
        for replica in self._replicas:
            replica.version = None

    async def _on_all(self, action: Callable[[ServerClient], Awaitable[None]]) -> None:
        """A server that fails in it is given up, like one that holds memory it should not."""

        async def act(replica: Replica) -> None:
            try:
                await action(replica.client)
            except ServerError as error:
                replica.fail(f"it did not follow: {error}")

        await asyncio.gather(*(act(replica) for replica in self._replicas if replica.is_up))

    def _give_up(self, replicas: Sequence[Replica], clients: Sequence[ServerClient], reason: str) -> list[Replica]:
        """Ends the servers that these clients talk to, and returns them: others may be up anew meanwhile."""
        same = _not_started_anew(replicas, clients)
        for replica in same:
            replica.fail(reason, is_final=not replica.is_ours)
        return same

    def _updated(self, replicas: Sequence[Replica], clients: Sequence[ServerClient], version: int) -> None:
        for replica in _not_started_anew(replicas, clients):
            replica.updated(version)
        self._router.go_on(version)

    async def _are_well(self, replicas: Sequence[Replica]) -> list[bool]:
        return await asyncio.gather(*(replica.is_well() for replica in replicas))

    async def _have_died(self, replicas: Sequence[Replica]) -> list[bool]:
        return await asyncio.gather(*(replica.has_died() for replica in replicas))

    def _sender_to(self, clients: list[ServerClient]) -> Sender:
        if self._sender is None or self._sender[0] != clients:
            self._drop_sender()
            self._sender = clients, self._connect(clients)
        return self._sender[1]

    def _drop_sender(self) -> None:
        if self._sender is not None:
            self._sender[1].close()
        self._sender = None


def _not_started_anew(replicas: Sequence[Replica], clients: Sequence[ServerClient]) -> list[Replica]:
    """Those that still run the server of this client. One that died early in an update, or at its very end, may be up
    again: it is well, and has nothing of the update."""
    return [replica for replica, client in zip(replicas, clients, strict=True) if replica.client is client]


@contextmanager
def open_group(
    runs: Sequence[tuple[str, Callable[[int], Running]]],
    sampling: SamplingConfig,
    fleet: FleetConfig,
    *,
    connect: Callable[[Sequence[ServerClient]], Sender],
    on_wait: Callable[[float], None],
) -> Iterator[ServerGroup]:
    """Starts the servers, watches them, and ends them whatever happens.

    runs: a name for each server, and what starts it (see `Replica`).
    on_wait: called with the seconds elapsed a few times a second until all answer.
    Raises ValueError for what cannot start, and ServerError when one of them does not start.
    """
    with start_blocking_portal(name="fleet") as portal:
        http = httpx.AsyncClient(limits=LIMITS, trust_env=False, headers=authorization())
        replicas: list[Replica] = []
        tasks: list[asyncio.Task[None]] = []
        has_memory = asyncio.Event()
        has_memory.set()

        async def start() -> None:
            """Starts all servers at once; the first failure ends the wait."""
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(3 * len(runs), "fleet"))
            for name, run in runs:
                replicas.append(
                    Replica(
                        name,
                        run,
                        http=http,
                        has_memory=has_memory,
                        heartbeat_timeout_s=fleet.heartbeat_timeout_s,
                        stuck_timeout_s=fleet.stuck_timeout_s,
                    )
                )
            started = time.monotonic()
            starts = asyncio.gather(*(replica.start() for replica in replicas))
            while not starts.done():
                on_wait(time.monotonic() - started)
                await asyncio.wait([starts], timeout=_POLL_S)
            starts.result()
            tasks.extend(asyncio.create_task(replica.keep()) for replica in replicas)

        async def stop() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(replica.close() for replica in replicas))
            await http.aclose()

        try:
            portal.call(start)
            group = ServerGroup(
                replicas, sampling, fleet, http=http, portal=portal, has_memory=has_memory, connect=connect
            )
            try:
                yield group
            finally:
                group.close()
        finally:
            portal.call(stop)
