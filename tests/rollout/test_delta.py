"""Updates that hold only what has changed: the encoding, and real processes that rebuild whole tensors from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.benchmark.bare_server import BareServer
from megatron_orz.config import FleetConfig, TransportKind
from megatron_orz.rollout import delta, transport
from megatron_orz.rollout.delta import apply_changes, pack_changes
from megatron_orz.rollout.transports import build_transport
from megatron_orz.rollout.verification import WeightMismatch
from megatron_orz.rollout.weight_sender import WeightSender
from megatron_orz.types import NamedWeights

KINDS: list[TransportKind] = ["gloo", "disk"]
LR = 1e-6


def places_of(size: int, kind: str) -> list[int]:
    generator = torch.Generator().manual_seed(size)
    return {
        "none": [],
        "first": [0],
        "last": [size - 1],
        "both ends": [0, size - 1],
        "every 256th": list(range(255, size, 256)),
        "every 257th": list(range(256, size, 257)),
        "all": list(range(size)),
        "some": sorted(torch.randperm(size, generator=generator)[: size // 30].tolist()),
    }[kind]


@pytest.mark.parametrize("size", [1, 256, 257, 5000])
@pytest.mark.parametrize("kind", ["none", "first", "last", "both ends", "every 256th", "every 257th", "all", "some"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_lead_from_the_old_weights_to_the_new(size: int, kind: str, dtype: torch.dtype) -> None:
    places = places_of(size, kind)
    old = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    new = old.clone()
    new.view(torch.int16)[places] ^= 1
    changes = pack_changes(old, new)
    num_sent = len({*places, *range(255, size, 256)})  # a gap fits a byte
    if 3 * num_sent > size:
        assert changes is None, "that would be more than half of it"
        return
    assert changes is not None
    assert len(changes) == 3 * num_sent
    begin = torch.zeros(1 + len(changes), dtype=torch.uint8)  # in a bucket they begin anywhere
    begin[1:] = changes
    apply_changes(old, begin[1:])
    assert torch.equal(old.view(torch.int16), new.view(torch.int16))


def test_bits_travel_where_values_are_equal_or_none() -> None:
    """Zeros of either sign, and what is not a number."""
    old = torch.tensor([0.0, -0.0, torch.nan, 1.0] + 8 * [1.0], dtype=torch.bfloat16)
    new = torch.tensor([-0.0, -0.0, torch.nan, torch.inf] + 8 * [1.0], dtype=torch.bfloat16)
    changes = pack_changes(old, new)
    assert changes is not None
    assert len(changes) == 3 * 2
    apply_changes(old, changes)
    assert torch.equal(old.view(torch.int16), new.view(torch.int16))


@pytest.mark.parametrize("num_bytes", [1, 4, 3 * 8])
def test_changes_of_another_tensor_are_refused(num_bytes: int) -> None:
    changes = torch.zeros(num_bytes, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"{num_bytes} bytes of changes do not belong to a tensor of 7 elements"):
        apply_changes(torch.zeros(7, dtype=torch.bfloat16), changes)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[BareServer]]:
    with BareServer(verifies=True, dtype="bfloat16") as one, BareServer(verifies=True, dtype="bfloat16") as two:
        for server in (one, two):
            server.post("/health", timeout_s=200.0)
        yield [one, two]


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BUCKET_BYTES", 4096)
    monkeypatch.setattr(transport, "CHANGES_BUCKET_BYTES", 512)


class Trained:
    """float32 weights of the size of real ones, which every step moves by the learning rate."""

    def __init__(self, num_tensors: int = 20) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.weights: dict[str, Tensor] = {
            f"layer.{index}": 0.02 * torch.randn(1 + 37 * (index % 5), 1 + 7 * index, generator=self._generator)
            for index in range(num_tensors)
        }

    def step(self, lr: float = LR) -> NamedWeights:
        for weight in self.weights.values():
            weight += lr * torch.randn(weight.shape, generator=self._generator).sign()
        return iter(self.weights.items())

    @property
    def gib(self) -> float:
        return sum(2 * weight.numel() for weight in self.weights.values()) / 2**30


def connected(servers: list[BareServer], kind: TransportKind, folder: Path, **options: Any) -> WeightSender:
    arguments = {"timeout_s": 60, "verification": "full", "delta": True, **options}
    sender = WeightSender(servers, build_transport(kind, folder=folder), **arguments)
    sender.connect()
    return sender


@pytest.mark.parametrize("kind", KINDS)
def test_servers_hold_every_weight_of_every_update(
    servers: list[BareServer], kind: TransportKind, tmp_path: Path
) -> None:
    trained = Trained()
    with closing(connected(servers, kind, tmp_path)) as sender:
        for version, lr in enumerate([LR, LR, LR, 0.0, 1e-2, LR]):
            sender.send(trained.step(lr), version)
            metrics = sender.metrics()
            assert metrics["sync/verified_tensors"] == 20
            num_bytes, sent = metrics["sync/gib"] / trained.gib, metrics["sync/sent_share"]
            if version == 0:
                assert (num_bytes, sent) == (1, 1)
            elif lr == LR:  # a change is 3 bytes, a weight 2
                assert 0.001 < sent < 0.05
                assert num_bytes == pytest.approx(1.5 * sent)
            elif lr == 0:
                assert num_bytes == pytest.approx(1.5 * sent)
                assert 0 < sent < 1 / 256
            else:
                assert (num_bytes, sent) == pytest.approx((1, 1), abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["lost", "flipped"])
def test_a_change_that_does_not_arrive_is_found_and_named(
    servers: list[BareServer], kind: TransportKind, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, whole = Trained(), delta.pack_changes

    def faulty(old: Tensor, new: Tensor) -> Tensor | None:
        changes = whole(old, new)
        if changes is None or len(new) != trained.weights["layer.17"].numel():
            return changes
        if fault == "lost":
            return changes[:0]
        changes[0] ^= 1
        return changes

    with closing(connected(servers, kind, tmp_path)) as sender:
        sender.send(trained.step(), 0)
        monkeypatch.setattr(delta, "pack_changes", faulty)
        with pytest.raises(WeightMismatch, match=r"1 of 20 verified tensors differ \(layer\.17: other values in"):
            sender.send(trained.step(), 1)
        monkeypatch.undo()
        sender.send(trained.step(), 2)
        assert sender.metrics()["sync/gib"] == trained.gib, "after a failure all is sent again"
        sender.send(trained.step(), 3)
        assert sender.metrics()["sync/gib"] < 0.1 * trained.gib


def test_changes_of_another_version_are_refused(servers: list[BareServer], tmp_path: Path) -> None:
    """As by a server that has missed an update."""
    trained = Trained()
    with closing(connected(servers, "gloo", tmp_path)) as sender:
        sender.send(trained.step(), 4)
        assert sender._stream is not None
        sender._stream.commit(5)
        with pytest.raises(RuntimeError, match="weights of version 5, but this worker holds version 4; all weights"):
            sender.send(trained.step(), 6)
    with closing(connected(servers, "gloo", tmp_path)) as sender:
        sender.send(trained.step(), 6)
        assert sender.metrics()["sync/gib"] == trained.gib, "who connects anew gets all"


def test_float32_servers_are_refused(tmp_path: Path) -> None:
    with BareServer() as server:
        server.post("/health", timeout_s=200.0)
        with pytest.raises(ValueError, match=r"torch\.float32, nearly all of which change .* fleet\.delta to false"):
            connected([server], "gloo", tmp_path)


@pytest.mark.parametrize("options", [{"transport": "ipc"}, {"transport": "nccl"}, {}, {"kind": "sglang"}])
def test_where_a_delta_does_not_pay_it_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fleet\.delta .* or fleet\.delta to false"):
        FleetConfig(delta=True, **options)
