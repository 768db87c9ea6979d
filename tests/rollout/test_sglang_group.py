"""Broadcasts of weights in a group of torch's, to processes that receive as SGLang's workers do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import torch

from megatron_orz.config import FleetConfig
from megatron_orz.rollout import sglang_group
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.sglang_group import SGLangGroupSender
from megatron_orz.rollout.transports import choose_transport
from megatron_orz.types import NamedWeights
from tests.rollout.sglang_receiver import ReceivingServer, fingerprints
from tests.rollout.test_transports import AT_ONCE_S, DEADLINE_S, make_weights


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ReceivingServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ReceivingServer(tp_size=tp_size)) for tp_size in (1, 2)]


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_group, "BUCKET_BYTES", 4096)


def make_sender(servers: list[ReceivingServer]) -> SGLangGroupSender:
    sender = SGLangGroupSender(servers, backend="gloo", timeout_s=DEADLINE_S)
    sender.connect()
    return sender


def in_one_memory(weights: NamedWeights) -> NamedWeights:
    """As an engine that gathers every tensor into the same memory."""
    memory = torch.empty(100_000)
    for name, weight in weights:
        view = memory[: weight.numel()].view(weight.shape)
        view.copy_(weight)
        yield name, view


def test_every_rank_of_every_server_gets_every_bit_of_every_update(servers: list[ReceivingServer]) -> None:
    with closing(make_sender(servers)) as sender:
        for version in range(3):
            sender.send(in_one_memory(make_weights(version)), version)
            expected = fingerprints(make_weights(version), dtype=torch.float32)
            for held in (rank for server in servers for rank in server.held()):
                assert held.pop("version") == str(version)
                assert held.pop("groups")
                assert held == expected
        metrics = sender.metrics()
        assert metrics["sync/gib"] * 2**30 == sum(weight.nbytes for _, weight in make_weights(0))
        assert metrics["sync/verified_tensors"] == 0
        assert 0 <= metrics["sync/wait_s"] <= metrics["sync/send_s"]
    assert [rank["groups"] for server in servers for rank in server.held()] == [""] * 3, "a group was not left"


def test_servers_of_half_precision_get_half_the_bytes(servers: list[ReceivingServer]) -> None:
    server = servers[0]
    server.info["dtype"] = "bfloat16"
    try:
        with closing(make_sender([server])) as sender:
            sender.send(make_weights(7), 7)
    finally:
        server.info["dtype"] = "float32"
    (held,) = server.held()
    assert {name: held[name] for name, _ in make_weights(7)} == fingerprints(make_weights(7), dtype=torch.bfloat16)
    assert sender.metrics()["sync/gib"] * 2**30 == sum(weight.numel() * 2 for _, weight in make_weights(7))


def test_a_server_that_refuses_a_bucket_ends_the_update_at_once(servers: list[ReceivingServer]) -> None:
    """The last test of the first server, whose update stays open."""

    def weights() -> NamedWeights:
        yield from make_weights(0)
        yield "refused", torch.zeros(5000)

    with closing(make_sender(servers[:1])) as sender:
        sender.send(make_weights(1), 1)
        started = time.monotonic()
        with pytest.raises(ServerError, match="refused"):
            sender.send(weights(), 2)
        sender.close()
        assert time.monotonic() - started < AT_ONCE_S
        (held,) = servers[0].held()
        assert held["version"] == "1"


def test_a_server_that_dies_ends_the_update_before_its_deadline(servers: list[ReceivingServer]) -> None:
    """The last test of the second server, one of whose ranks is killed."""

    def weights() -> NamedWeights:
        for index, item in enumerate(make_weights(0)):
            if index == 20:
                servers[1].processes[1].kill()
            yield item

    with closing(make_sender(servers[1:])) as sender:
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            sender.send(weights(), 2)
        sender.close()
        assert time.monotonic() - started < AT_ONCE_S


def test_a_server_that_cannot_join_as_a_whole_is_refused() -> None:
    with ReceivingServer(pp_size=2) as server:
        with pytest.raises(ValueError, match=r"has pp_size 2 and dp_size 1, .* or set fleet.transport to disk"):
            make_sender([server])
        del server.info["dp_size"]
        with pytest.raises(ServerError, match="/server_info says nothing of dp_size"):
            make_sender([server])


@pytest.mark.parametrize(
    ("has_gpus", "fleet", "expected"),
    [
        (True, {"urls": ("http://127.0.0.1:8000",)}, "nccl"),
        (True, {"gpus": (4, 5), "server_tp": 2}, "nccl"),
        (True, {"gpus": (1, 0), "server_tp": 2}, "disk"),
        (True, {}, "disk"),
        (False, {}, "disk"),
        (False, {"transport": "gloo"}, "gloo"),
        (True, {"transport": "disk"}, "disk"),
    ],
)
def test_the_fastest_transport_that_sglang_receives_by_is_chosen(
    monkeypatch: pytest.MonkeyPatch, has_gpus: bool, fleet: dict[str, object], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    assert choose_transport(FleetConfig(kind="sglang", **fleet)) == expected  # type: ignore[arg-type]


def test_a_transport_that_sglang_does_not_receive_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"ipc, by which SGLang's servers get no weights; set nccl, gloo or disk"):
        choose_transport(FleetConfig(kind="sglang", transport="ipc"))
    with pytest.raises(ValueError, match=r"a server gets the first, which rank 0 has; name others in fleet\.gpus"):
        choose_transport(FleetConfig(kind="sglang", transport="nccl"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_weights_of_a_gpu_reach_servers_on_others(backend: sglang_group.GroupBackend) -> None:
    num_gpus = torch.cuda.device_count()
    if backend == "nccl" and num_gpus == 1:
        pytest.skip("each process of an nccl group needs a GPU of its own")
    device = "cuda:1" if num_gpus > 1 else "cuda:0"
    with ReceivingServer(device=device, dtype="bfloat16") as server:
        sender = SGLangGroupSender([server], backend=backend, timeout_s=60)
        sender.connect()
        with closing(sender):
            for version in range(3):
                sender.send(in_one_memory((name, weight.cuda()) for name, weight in make_weights(version)), version)
                (held,) = server.held()
                expected = fingerprints(make_weights(version), dtype=torch.bfloat16)
                assert {name: held[name] for name in expected} == expected
