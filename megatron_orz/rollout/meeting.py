"""Where the trainer and the servers' workers meet, and how they keep step: a key-value store that the trainer hosts.

The trainer announces numbered messages, which every worker hears in order, and learns when all of them have released
what a message was about. Several ranks of the trainer may send: the store numbers what they say, so that all workers
take it in the same order. Two sides that wait for each other have the same deadline, so neither waits for ever.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Self
from urllib.parse import urlsplit

import torch.distributed as dist

_FIRST_POLL_S, _LAST_POLL_S = 1e-4, 2e-2


class MeetingError(RuntimeError):
    """The other side did not do its part in time."""


class Meeting:
    """One side of the meeting. A message exists from `announce` until all workers have released it.

    timeout_s: deadline of every single wait.
    """

    def __init__(
        self, store: dist.TCPStore, *, address: str, num_workers: int, timeout_s: float, sender: int = 0
    ) -> None:
        """address: of this side, as seen by the other. sender: which of the trainer's ranks that send this is about."""
        self.store = store
        self.address = address
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.sender = sender

    @classmethod
    def host(cls, address: str, *, num_workers: int, timeout_s: float) -> Self:
        """The trainer's side, on a free port of `address` (`store.port`)."""
        # Left to itself, the store listens on every interface of the machine.
        listener = socket.create_server((address, 0), family=_family(address))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        return cls(store, address=address, num_workers=num_workers, timeout_s=timeout_s)

    @classmethod
    def join(cls, address: str, port: int, *, num_workers: int, timeout_s: float) -> Self:
        """A worker's side."""
        store = _connection(address, port, timeout_s)
        return cls(store, address=address_towards(address, port), num_workers=num_workers, timeout_s=timeout_s)

    def of(self, sender: int) -> Meeting:
        """The same meeting, about one of the senders, over a connection of its own, as a wait has one to itself."""
        store = _connection(self.store.host, self.store.port, self.timeout_s)
        return Meeting(
            store, address=self.address, num_workers=self.num_workers, timeout_s=self.timeout_s, sender=sender
        )

    def announce(self, message: dict[str, Any]) -> int:
        """A sender says something to every worker. Returns its number, counted from 0 over all senders."""
        number = self.store.add("announced", 1) - 1
        self.store.set(f"message/{number}", json.dumps({"sender": self.sender, **message}))
        return number

    def hear(self, number: int) -> dict[str, Any]:
        """A worker waits for a message."""
        message: dict[str, Any] = json.loads(self.store.get(f"message/{number}"))
        return message

    def release(self, number: int) -> None:
        """A worker has done what the message asked for."""
        if self.store.add(f"released/{number}", 1) == self.num_workers:
            self.store.set(f"done/{number}", "")

    def wait_until_released(self, number: int, check: Callable[[], object]) -> None:
        """A sender waits for all workers; calls `check` meanwhile, which raises when they cannot go on.

        Raises MeetingError.
        """
        self._wait(f"done/{number}", check, "the servers' workers did not take a bucket of weights")
        for key in ("message", "released", "done"):
            self.store.delete_key(f"{key}/{number}")

    def tell(self, key: str, value: object) -> None:
        """A sender says something to another: JSON."""
        self.store.set(f"told/{key}", json.dumps(value))

    def learn(self, key: str, check: Callable[[], object]) -> Any:
        """What another sender tells, once; as `wait_until_released`."""
        self._wait(f"told/{key}", check, f"another sender of weights did not tell its {key}")
        value = json.loads(self.store.get(f"told/{key}"))
        self.store.delete_key(f"told/{key}")
        return value

    @contextmanager
    def sharing_fate(self) -> Iterator[None]:
        """The first error in the body of any sender is what `check_others` raises on the others."""
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # the store may be gone, with the process that hosts it
                self.store.compare_set("failure", "", f"{type(error).__name__}: {error}")
            raise

    def check_others(self) -> None:
        """Raises MeetingError when another sender has failed."""
        if self.store.check(["failure"]):
            raise MeetingError(f"another sender of weights failed: {self.store.get('failure').decode()}")

    def _wait(self, key: str, check: Callable[[], object], complaint: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        poll_s = _FIRST_POLL_S
        while not self.store.check([key]):
            check()
            if time.monotonic() > deadline:
                raise MeetingError(f"{complaint} within {self.timeout_s:g} s")
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, _LAST_POLL_S)


def _connection(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another (or to itself); nothing is sent."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
        return address


def meeting_address(urls: list[str]) -> str:
    """The address at which all of these servers reach this machine: loopback unless one of them is elsewhere."""
    addresses = {address_towards(urlsplit(url).hostname or "127.0.0.1", urlsplit(url).port or 80) for url in urls}
    elsewhere = sorted(address for address in addresses if not address.startswith("127.") and address != "::1")
    if len(elsewhere) > 1:
        raise ValueError(
            f"the servers are reached from different addresses of this machine ({', '.join(elsewhere)}); "
            "give fleet.urls in one network"
        )
    return elsewhere[0] if elsewhere else "127.0.0.1"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
