"""Where the trainer and the servers' workers meet, and how they keep step: a key-value store that the trainer hosts.

The trainer announces numbered messages, which every worker hears in order, and learns when all of them have released
what a message was about. Two sides that wait for each other have the same deadline, so neither waits for ever.

Imported on both sides: nothing but torch.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
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

    def __init__(self, store: dist.TCPStore, *, address: str, num_workers: int, timeout_s: float) -> None:
        """address: of this side, as seen by the other."""
        self.store = store
        self.address = address
        self.num_workers = num_workers
        self.timeout_s = timeout_s

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
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        return cls(store, address=address_towards(address, port), num_workers=num_workers, timeout_s=timeout_s)

    def announce(self, number: int, message: dict[str, Any]) -> None:
        """The trainer says something to every worker."""
        self.store.set(f"message/{number}", json.dumps(message))

    def hear(self, number: int) -> dict[str, Any]:
        """A worker waits for a message."""
        message: dict[str, Any] = json.loads(self.store.get(f"message/{number}"))
        return message

    def release(self, number: int) -> None:
        """A worker has done what the message asked for."""
        if self.store.add(f"released/{number}", 1) == self.num_workers:
            self.store.set(f"done/{number}", "")

    def wait_until_released(self, number: int, check: Callable[[], object]) -> None:
        """The trainer waits for all workers; calls `check` meanwhile, which raises when they cannot go on.

        Raises MeetingError.
        """
        deadline = time.monotonic() + self.timeout_s
        poll_s = _FIRST_POLL_S
        while not self.store.check([f"done/{number}"]):
            check()
            if time.monotonic() > deadline:
                raise MeetingError(f"the servers' workers did not take a bucket of weights within {self.timeout_s:g} s")
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, _LAST_POLL_S)
        for key in ("message", "released", "done"):
            self.store.delete_key(f"{key}/{number}")


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
