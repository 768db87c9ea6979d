"""The transports between real processes: workers without a model, which take digests of what arrives."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_orz.benchmark.bare_server import BareServer
from megatron_orz.config import FleetConfig, TransportKind
from megatron_orz.rollout import kinds, transport
from megatron_orz.rollout.buckets import Bucket
from megatron_orz.rollout.transports import build_transport, choose_transport
from megatron_orz.rollout.verification import SAMPLING_PERIOD, WeightMismatch
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.weight_sender import WeightSender
from megatron_orz.types import NamedWeights
from tests.rollout.conftest import model_config

STARTED_WITHIN_S = 200.0
DEADLINE_S = 240.0
"""Of connecting and of updates."""
AT_ONCE_S = 120.0
"""However busy the machine is, what takes no longer has not waited for the deadline."""
KINDS: list[TransportKind] = ["ipc", "gloo", "disk"]


def start(stack: ExitStack, *servers: BareServer) -> list[BareServer]:
    for server in servers:
        stack.enter_context(server)
    for server in servers:
        server.post("/health", timeout_s=STARTED_WITHIN_S)
    return list(servers)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[BareServer]]:
    with ExitStack() as stack:
        yield start(stack, BareServer(verifies=True), BareServer(verifies=True))


@pytest.fixture(scope="module")
def half_server() -> Iterator[BareServer]:
    with ExitStack() as stack:
        yield start(stack, BareServer(verifies=True, dtype="bfloat16"))[0]


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BUCKET_BYTES", 4096)


def make_weights(seed: int, num_tensors: int = 40) -> NamedWeights:
    """Tensors smaller and larger than a bucket."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(num_tensors):
        yield f"layer.{index}", torch.randn(1 + 37 * (index % 5), 1 + index, generator=generator)


def make_sender(servers: list[BareServer], kind: TransportKind, folder: Path, **options: Any) -> WeightSender:
    sender = WeightSender(
        servers, build_transport(kind, folder=folder), **{"timeout_s": DEADLINE_S, "verification": "full", **options}
    )
    sender.connect()
    return sender


@pytest.mark.parametrize("kind", KINDS)
def test_every_server_gets_every_update(servers: list[BareServer], kind: TransportKind, tmp_path: Path) -> None:
    with closing(make_sender(servers, kind, tmp_path)) as sender:
        for version in range(3):
            sender.send(make_weights(version), version)
    assert list(tmp_path.iterdir()) == [], "files are left behind"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_converted_on_the_way(half_server: BareServer, kind: TransportKind, tmp_path: Path) -> None:
    num_elements = sum(weight.numel() for _, weight in make_weights(0))
    with closing(make_sender([half_server], kind, tmp_path)) as sender:
        sender.send(make_weights(0), 0)
        metrics = sender.metrics()
    assert metrics["sync/gib"] * 2**30 == 2 * num_elements
    assert metrics["sync/verified_tensors"] == 40
    assert metrics["sync/send_s"] > metrics["sync/wait_s"] > 0


def test_servers_of_different_types_are_refused(
    servers: list[BareServer], half_server: BareServer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"types \['bfloat16', 'float32'\]; start all of them with the same --dtype"):
        make_sender([servers[0], half_server], "ipc", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_flipped_on_the_way_is_found_and_named(
    servers: list[BareServer], kind: TransportKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(make_sender(servers, kind, tmp_path)) as sender:
        whole = type(sender._transport).send

        def send(self: Any, bucket: Bucket, slot: int) -> dict[str, Any]:
            for name, tensor in bucket.tensors():
                if name == "layer.17":
                    tensor.view(torch.uint8)[-1, -1] ^= 1
            return whole(self, bucket, slot)

        monkeypatch.setattr(type(sender._transport), "send", send)
        with pytest.raises(WeightMismatch, match=r"1 of 40 verified tensors differ \(layer\.17: other values in"):
            sender.send(make_weights(0), 0)


class Wrapped(BareServer):
    """A server that others use as well, with something of its own between it and the trainer."""

    def __init__(self, server: BareServer) -> None:
        self.__dict__ = server.__dict__


def test_every_server_is_verified(servers: list[BareServer], tmp_path: Path) -> None:
    class Forgetful(Wrapped):
        url = "http://127.0.0.1:2"

        def post(self, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
            answer = super().post(path, body, **options)
            if path == "/collective_rpc" and body["method"] == "weight_digests":
                answer["results"][0]["layer.3"][0]["digest"] ^= 1
            return answer

    for both in ([servers[0], Forgetful(servers[1])], [Forgetful(servers[0]), servers[1]]):
        with (
            closing(make_sender(both, "ipc", tmp_path)) as sender,
            pytest.raises(WeightMismatch, match=r"the server at http://127\.0\.0\.1:2 .* 1 of 40 .* \(layer\.3: "),
        ):
            sender.send(make_weights(0), 0)


def test_later_updates_are_verified_in_turn(servers: list[BareServer], tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Watched(Wrapped):
        def post(self, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
            if path == "/collective_rpc" and body["method"] == "weight_digests":
                asked.append(body["args"][0])
            return super().post(path, body, **options)

    with closing(make_sender([Watched(servers[0])], "ipc", tmp_path, verification="sampled")) as sender:
        for version in range(1 + SAMPLING_PERIOD):
            sender.send(make_weights(version), version)
    names = [name for name, _ in make_weights(0)]
    assert asked[0] == names
    assert all(len(some) <= len(names) // SAMPLING_PERIOD + 1 for some in asked[1:])
    assert sorted(name for some in asked[1:] for name in some) == sorted(names)


class Refusing(Wrapped):
    """Fails when it is asked for one thing."""

    def __init__(self, server: BareServer, path: str) -> None:
        super().__init__(server)
        self._refused = path

    def post(self, path: str, *args: Any, **options: Any) -> dict[str, Any]:
        if path == self._refused:
            raise RuntimeError("out of memory")
        return super().post(path, *args, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_refuses_an_update_is_an_error_at_once(
    servers: list[BareServer], kind: TransportKind, tmp_path: Path
) -> None:
    sender = make_sender([Refusing(servers[0], "/update_weights")], kind, tmp_path)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        sender.send(make_weights(0), 0)
    sender.close()
    del sender
    gc.collect()
    assert time.monotonic() - started < AT_ONCE_S, "something waits for the server that has failed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_refuses_to_connect_is_an_error_at_once(
    servers: list[BareServer], kind: TransportKind, tmp_path: Path
) -> None:
    """The trainer's half waits for it all the while."""
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        make_sender([Refusing(servers[0], "/init_weight_transfer_engine")], kind, tmp_path)
    assert time.monotonic() - started < AT_ONCE_S


def test_weights_that_fail_to_come_end_the_update(servers: list[BareServer], tmp_path: Path) -> None:
    """The trainer's own error is raised as it is, and the servers do not wait longer than the deadline."""

    def failing() -> NamedWeights:
        yield from make_weights(0, num_tensors=20)
        raise ArithmeticError("a rank died")

    sender = make_sender(servers[:1], "ipc", tmp_path, timeout_s=10)
    sender._timeout_s = DEADLINE_S  # the trainer's own
    with pytest.raises(ArithmeticError, match="a rank died"):
        sender.send(failing(), 0)
    sender.close()
    with closing(make_sender(servers[:1], "ipc", tmp_path)) as again:
        again.send(make_weights(0), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_is_an_error_at_once(kind: TransportKind, tmp_path: Path) -> None:
    with BareServer() as doomed:
        doomed.post("/health", timeout_s=STARTED_WITHIN_S)
        sender = make_sender([doomed], kind, tmp_path, verification="off")

        def dying() -> NamedWeights:
            for index, item in enumerate(make_weights(0)):
                if index == 20:
                    doomed.process.kill()
                    doomed.process.join()
                yield item

        started = time.monotonic()
        with pytest.raises((EOFError, RuntimeError, ConnectionError)):
            sender.send(dying(), 0)
        sender.close()
        assert time.monotonic() - started < AT_ONCE_S


def test_a_server_that_stalls_ends_at_the_deadline(tmp_path: Path) -> None:
    with BareServer() as stalled:
        stalled.post("/health", timeout_s=STARTED_WITHIN_S)
        process = psutil.Process(stalled.process.pid)
        sender = make_sender([stalled], "ipc", tmp_path, verification="off")
        sender._timeout_s = 2  # of the update alone
        process.suspend()
        started = time.monotonic()
        with pytest.raises((TimeoutError, RuntimeError)):
            sender.send(make_weights(0), 0)
        assert time.monotonic() - started < AT_ONCE_S
        sender.close()


def test_updates_leak_no_files(servers: list[BareServer], tmp_path: Path) -> None:
    processes = [psutil.Process(), *(psutil.Process(server.process.pid) for server in servers)]
    for kind in KINDS:
        with closing(make_sender(servers, kind, tmp_path)) as sender:
            counts = []
            for version in range(12):
                sender.send(make_weights(version), version)
                counts.append([process.num_fds() for process in processes])
            # What earlier tests have left behind may be freed meanwhile.
            assert all(last <= early for early, last in zip(counts[3], counts[-1], strict=True)), counts


def test_the_meeting_listens_on_its_own_address_alone(servers: list[BareServer], tmp_path: Path) -> None:
    with closing(make_sender(servers[:1], "ipc", tmp_path)) as sender:
        assert sender._meeting is not None
        port = sender._meeting.store.port
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(os.getpid()).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
    assert listening == ["127.0.0.1"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ipc", "nccl", "gloo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_a_gpu_reach_a_server_on_the_next(kind: TransportKind, dtype: str, tmp_path: Path) -> None:
    num_gpus = torch.cuda.device_count()
    if kind == "nccl" and num_gpus == 1:
        pytest.skip("each process of an nccl group needs a GPU of its own")
    with ExitStack() as stack:
        device = "cuda:1" if num_gpus > 1 else "cuda:0"
        servers = start(stack, BareServer(verifies=True, device=device, dtype=dtype))
        with closing(make_sender(servers, kind, tmp_path)) as sender:
            for version in range(3):
                sender.send(((name, weight.cuda()) for name, weight in make_weights(version)), version)


def test_memory_that_cannot_be_opened_is_said_with_the_remedy(
    servers: list[BareServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from another container, where the trainer's process has another number."""
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    message = r"cannot open the trainer's memory .* fleet\.transport gloo or disk"
    with (
        closing(make_sender(servers[:1], "ipc", tmp_path)) as sender,
        pytest.raises(RuntimeError, match=message),
    ):
        sender.send(make_weights(0), 0)


def test_a_sender_that_cannot_join_its_servers_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[WeightSender] = []

    class Unable(WeightSender):
        def connect(self) -> None:
            raise ValueError("the servers' weights have different types")

        def close(self) -> None:
            super().close()
            closed.append(self)

    monkeypatch.setattr(kinds, "WeightSender", Unable)
    connect = kinds.weight_sender("vllm", FleetConfig(), model_config(tmp_path), run_dir=tmp_path)
    with (
        VLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client,
        pytest.raises(ValueError, match="different types"),
    ):
        connect([client])
    assert len(closed) == 1


ELSEWHERE = ("http://127.0.0.1:8000", "http://10.0.0.7:8000")


def test_a_transport_that_does_not_reach_the_servers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"fleet\.transport is ipc, .* set nccl, gloo or disk"):
        choose_transport(FleetConfig(transport="ipc", urls=ELSEWHERE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"fleet\.transport is nccl, but there is no GPU here"):
        choose_transport(FleetConfig(transport="nccl"))
    with pytest.raises(ValueError, match=r"fleet\.transport is nccl, which joins no two processes on one GPU"):
        FleetConfig(transport="nccl", colocated=True)


@pytest.mark.parametrize(("has_gpus", "elsewhere"), [(False, "gloo"), (True, "nccl")])
def test_the_fastest_transport_that_reaches_is_chosen(
    monkeypatch: pytest.MonkeyPatch, has_gpus: bool, elsewhere: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    assert choose_transport(FleetConfig()) == "ipc"
    assert choose_transport(FleetConfig(urls=ELSEWHERE[:1])) == "ipc"
    assert choose_transport(FleetConfig(urls=ELSEWHERE)) == elsewhere
    assert choose_transport(FleetConfig(urls=ELSEWHERE, transport="disk")) == "disk"
