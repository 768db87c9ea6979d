"""The plain ways of bytes that a weight exchange is measured beside: memory, a file, a socket."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_orz.rollout.process_group import NUM_CONNECTIONS

Weights = Sequence[tuple[str, Tensor]]

TIMEOUT_S = 60.0
_ARRIVED = b"!"


def memcpy(weights: Weights) -> Callable[[], None]:
    """Copies every tensor once, into memory that exists."""
    copies = [torch.zeros_like(weight) for _, weight in weights]

    def copy() -> None:
        for target, (_, weight) in zip(copies, weights, strict=True):
            target.copy_(weight)
        if copies[0].is_cuda:
            torch.cuda.synchronize()

    return copy


def disk(weights: Weights, path: Path) -> Callable[[], None]:
    """Writes all bytes into a file and reads them back, as far as the operating system's cache lets them wait."""
    arrays = _arrays(weights)
    buffer = bytearray(max(array.nbytes for array in arrays))

    def write_and_read() -> None:
        with path.open("wb") as file:
            for array in arrays:
                file.write(array.data)
        with path.open("rb") as file:
            while file.readinto(buffer):
                pass
        path.unlink()

    return write_and_read


@contextmanager
def loopback(weights: Weights) -> Iterator[Callable[[], None]]:
    """Sends all bytes to another process of this machine, over as many connections as the gloo transport has."""
    split = _split(_arrays(weights))
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(TIMEOUT_S)
        sizes = [sum(len(part) for part in parts) for parts in split]
        context = multiprocessing.get_context("spawn")
        receiver = context.Process(target=_receive, args=(listener.getsockname()[1], sizes), daemon=True)
        receiver.start()
        stack.callback(receiver.join, TIMEOUT_S)
        stack.callback(receiver.kill)
        connections = [stack.enter_context(listener.accept()[0]) for _ in sizes]
        by_index = {connection.recv(1)[0]: connection for connection in connections}

        def send() -> None:
            _in_threads(_send, [(by_index[index], parts) for index, parts in enumerate(split)])

        yield send


def _arrays(weights: Weights) -> list[np.ndarray]:
    return [weight.cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, weight in weights]


def _split(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Each connection's part of every array."""
    return [[np.array_split(array, NUM_CONNECTIONS)[index] for array in arrays] for index in range(NUM_CONNECTIONS)]


def _send(connection: socket.socket, parts: Sequence[np.ndarray]) -> None:
    connection.settimeout(TIMEOUT_S)
    for part in parts:
        connection.sendall(part.data)
    if connection.recv(1) != _ARRIVED:
        raise RuntimeError("the receiver of the loopback connection has ended")


def _receive(port: int, sizes: Sequence[int]) -> None:
    connections = [socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) for _ in sizes]
    for index, connection in enumerate(connections):
        connection.sendall(bytes([index]))
    _in_threads(_drain, list(zip(connections, sizes, strict=True)))


def _drain(connection: socket.socket, num_bytes: int) -> None:
    """Takes so many bytes into memory that exists and says so, until the other side has gone."""
    connection.settimeout(None)
    memory = memoryview(bytearray(num_bytes))
    while True:
        filled = 0
        while filled < num_bytes:
            received = connection.recv_into(memory[filled:])
            if received == 0:
                return
            filled += received
        connection.sendall(_ARRIVED)


def _in_threads(call: Callable[..., None], arguments: Sequence[tuple[object, ...]]) -> None:
    """Raises the first error of a call."""
    with ThreadPoolExecutor(len(arguments)) as threads:
        for future in [threads.submit(call, *each) for each in arguments]:
            future.result()
