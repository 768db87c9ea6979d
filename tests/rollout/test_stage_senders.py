"""Weights that several ranks send. Threads or ranks play the pipeline stages; workers without a model take digests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_orz.benchmark.bare_pipeline import BarePipeline
from megatron_orz.benchmark.bare_server import BareServer
from megatron_orz.command_line import RANK_LOST, plain_errors
from megatron_orz.config import FleetConfig, TransportKind, Verification
from megatron_orz.ranks import Ranks
from megatron_orz.rollout import transport
from megatron_orz.rollout.fleet import ServerFleet
from megatron_orz.rollout.gloo_transport import GlooTransport
from megatron_orz.rollout.kinds import stage_senders
from megatron_orz.rollout.meeting import Meeting
from megatron_orz.rollout.server_group import Sender
from megatron_orz.rollout.servers import free_port
from megatron_orz.rollout.stage_senders import StageSenders
from megatron_orz.types import NamedWeights, RepeatableWeights
from megatron_orz.watchdog import Watchdog
from tests.launch import rank_main, run_ranks
from tests.rollout.test_transports import STARTED_WITHIN_S, Refusing, make_weights, start

KINDS: list[TransportKind] = ["gloo", "disk"]
NUM_STAGES = 3


@pytest.fixture(scope="module")
def servers() -> Iterator[list[BareServer]]:
    with ExitStack() as stack:
        yield start(stack, BareServer(verifies=True), BareServer(verifies=True))


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BUCKET_BYTES", 4096)
    monkeypatch.setattr(transport, "CHANGES_BUCKET_BYTES", 512)


def of_stage(stage: int, seed: int = 0, num_stages: int = NUM_STAGES) -> NamedWeights:
    """Of 40 tensors, in order, this stage's."""
    for index, item in enumerate(make_weights(seed)):
        if index * num_stages // 40 == stage:
            yield item


@contextmanager
def open_pipeline(
    servers: Sequence[Any],
    kind: TransportKind,
    folder: Path,
    *,
    num_stages: int = NUM_STAGES,
    timeout_s: float = 240,
    verification: Verification = "full",
    delta: bool = False,
) -> Iterator[BarePipeline]:
    pipeline = BarePipeline(
        servers, kind, folder, num_stages=num_stages, timeout_s=timeout_s, verification=verification, delta=delta
    )
    with closing(pipeline):
        yield pipeline


def parts(weights: Callable[[int], NamedWeights], num_stages: int = NUM_STAGES) -> list[NamedWeights]:
    return [weights(stage) for stage in range(num_stages)]


class Watched(BareServer):
    """Notes which tensors it is asked for, and what it has of them."""

    def __init__(self, server: BareServer) -> None:
        self.__dict__ = server.__dict__ | {"held": {}}

    def post(self, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        answer = super().post(path, body, **options)
        if path == "/collective_rpc" and body["method"] == "weight_digests":
            self.__dict__["held"] = answer["results"][0]
        return answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", [0, 1, 2, None])
def test_every_server_gets_the_weights_of_every_stage(
    servers: list[BareServer], kind: TransportKind, slow: int | None, tmp_path: Path
) -> None:
    """Whichever stage is slow: the workers take the buckets in the order in which they are announced."""

    def weights(version: int, stage: int) -> NamedWeights:
        for name, weight in of_stage(stage, version):
            time.sleep(0.02 if stage == slow else 0)
            yield name, weight

    num_bytes = sum(weight.nbytes for _, weight in make_weights(0))
    with open_pipeline(servers, kind, tmp_path) as pipeline:
        pipeline.connect()
        for version in range(2):
            pipeline.send(parts(partial(weights, version)), version)
            metrics = pipeline.metrics()
            assert metrics["sync/verified_tensors"] == 40
            assert metrics["sync/gib"] * 2**30 == num_bytes
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "files are left behind"


def test_stages_send_what_one_sender_sends(servers: list[BareServer], tmp_path: Path) -> None:
    held = []
    for num_stages in (1, NUM_STAGES):
        watched = Watched(servers[0])
        with open_pipeline([watched], "gloo", tmp_path, num_stages=num_stages) as pipeline:
            pipeline.connect()
            pipeline.send(parts(partial(of_stage, num_stages=num_stages), num_stages), 7)
        held.append(watched.__dict__["held"])
    assert len(held[0]) == 40
    assert held[0] == held[1]


def test_each_stage_sends_only_what_it_has_changed(tmp_path: Path) -> None:
    def trained(version: int, stage: int) -> NamedWeights:
        for name, weight in of_stage(stage):
            weight.view(-1)[: 1 + weight.numel() // 100] += version
            yield name, weight

    num_elements = sum(weight.numel() for _, weight in make_weights(0))
    with ExitStack() as stack:
        server = start(stack, BareServer(verifies=True, dtype="bfloat16"))[0]
        pipeline = stack.enter_context(open_pipeline([server], "gloo", tmp_path, delta=True))
        pipeline.connect()
        for version in range(3):
            pipeline.send(parts(partial(trained, version)), version)
            metrics = pipeline.metrics()
            assert metrics["sync/verified_tensors"] == 40
            assert (
                metrics["sync/gib"] * 2**30 == 2 * num_elements if version == 0 else metrics["sync/sent_share"] < 0.05
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failing", range(NUM_STAGES))
def test_a_stage_that_fails_ends_the_update_everywhere_with_its_reason(
    servers: list[BareServer], kind: TransportKind, failing: int, tmp_path: Path
) -> None:
    def weights(stage: int) -> NamedWeights:
        for index, item in enumerate(of_stage(stage)):
            if stage == failing and index == 8:
                raise ArithmeticError("a rank died")
            yield item

    with open_pipeline(servers, kind, tmp_path, timeout_s=60) as pipeline:
        pipeline.connect()
        started = time.monotonic()
        with pytest.raises(ArithmeticError if failing == 0 else RuntimeError, match="a rank died"):
            pipeline.send(parts(weights), 0)
        assert all("a rank died" in str(error) for error in pipeline.errors)
        assert time.monotonic() - started < 30
    # A worker may hold on to the first pipeline until the deadline of that.
    with open_pipeline(servers, kind, tmp_path) as again:
        again.connect()
        again.send(parts(of_stage), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_ends_the_update_on_every_stage(kind: TransportKind, tmp_path: Path) -> None:
    with BareServer() as doomed:
        doomed.post("/health", timeout_s=STARTED_WITHIN_S)

        def weights(stage: int) -> NamedWeights:
            for index, item in enumerate(of_stage(stage)):
                if (stage, index) == (1, 8):
                    doomed.process.kill()
                    doomed.process.join()
                yield item

        with open_pipeline([doomed], kind, tmp_path, verification="off") as pipeline:
            pipeline.connect()
            started = time.monotonic()
            with pytest.raises((EOFError, RuntimeError, ConnectionError)):
                pipeline.send(parts(weights), 0)
            assert None not in pipeline.errors
            assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_refuses_to_connect_is_an_error_on_every_stage_at_once(
    servers: list[BareServer], kind: TransportKind, tmp_path: Path
) -> None:
    with open_pipeline([Refusing(servers[0], "/init_weight_transfer_engine")], kind, tmp_path) as pipeline:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="out of memory"):
            pipeline.connect()
        assert len(pipeline.errors) == 2
        assert all("another sender of weights failed: RuntimeError: out of memory" in str(e) for e in pipeline.errors)
        assert time.monotonic() - started < 30


def test_a_stage_that_cannot_join_is_an_error_on_every_stage_at_once(
    servers: list[BareServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = GlooTransport.connect

    def unreachable(self: GlooTransport, meeting: Meeting) -> None:
        if meeting.sender == 2:
            raise OSError("no route to host")
        connect(self, meeting)

    monkeypatch.setattr(GlooTransport, "connect", unreachable)
    with open_pipeline(servers[:1], "gloo", tmp_path) as pipeline:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="another sender of weights failed: OSError: no route to host"):
            pipeline.connect()
        assert all("no route to host" in str(error) for error in pipeline.errors)
        assert time.monotonic() - started < 30


def test_a_stage_that_never_comes_ends_the_update_at_the_deadline(servers: list[BareServer], tmp_path: Path) -> None:
    """As where its process has died without a word: the watchdog of a run sees that sooner."""
    with open_pipeline(servers[:1], "gloo", tmp_path, timeout_s=5, num_stages=2) as pipeline:
        pipeline.connect()
        with pytest.raises(RuntimeError, match=r"longer than fleet\.update_timeout_s = 5 s|did not tell its sent/1"):
            pipeline.send(parts(of_stage, 1), 0)


ELSEWHERE = ("http://10.0.0.7:8000",)


@pytest.mark.parametrize(
    ("options", "first_ranks", "is_one_node", "send"),
    [
        ({"transport": "gloo"}, [0, 2], True, True),
        ({"transport": "disk", "delta": True}, [0, 2], True, True),
        ({"urls": ELSEWHERE}, [0, 2], False, True),
        ({"transport": "gloo"}, [0], True, False),
        ({}, [0, 2], True, False),  # by memory that servers and rank 0 share
        ({"transport": "gloo", "urls": ("http://127.0.0.1:8000",)}, [0, 2], False, False),
        ({"transport": "gloo", "kind": "sglang", "urls": ELSEWHERE}, [0, 2], True, False),
    ],
)
def test_stages_send_where_they_reach_the_servers(
    options: dict[str, Any], first_ranks: list[int], is_one_node: bool, send: bool, tmp_path: Path
) -> None:
    config, ranks = FleetConfig(**options), Ranks()
    senders = stage_senders(
        config.kind,  # type: ignore[arg-type]
        config,
        run_dir=tmp_path,
        first_ranks=first_ranks,
        is_one_node=is_one_node,
        ranks=ranks,
    )
    assert (senders is not None) == send


def test_a_server_on_the_gpu_of_a_stage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = FleetConfig(transport="nccl", gpus=(2, 3), num_servers=2)
    with pytest.raises(ValueError, match=r"fleet\.gpus \(2, 3\) has \[2\], on which ranks send"):
        stage_senders("vllm", config, run_dir=tmp_path, first_ranks=[0, 2], is_one_node=True, ranks=Ranks())
    assert stage_senders("vllm", config, run_dir=tmp_path, first_ranks=[0, 1], is_one_node=True, ranks=Ranks())


class Servers:
    """Of rank 0, in place of a `ServerGroup`."""

    def __init__(self, stack: ExitStack, senders: StageSenders) -> None:
        self._clients: list[Any] = start(stack, BareServer(verifies=True))
        self._senders = senders
        self._sender: Sender | None = None

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        self._sender = self._sender or self._senders.to(self._clients)
        try:
            self._sender.send(weights, version)
        except RuntimeError:
            self._sender.close()
            self._sender = None
            raise

    def metrics(self) -> dict[str, float]:
        assert self._sender is not None
        return self._sender.metrics()


def nowhere() -> NamedWeights:
    raise AssertionError("weights cross the pipeline")
    yield


@contextmanager
def open_ranks(folder: Path, first_ranks: Sequence[int]) -> Iterator[ServerFleet]:
    """A fleet of one server for ranks that are in a process group."""
    transport.BUCKET_BYTES = 4096
    config = FleetConfig(transport="gloo", verification="full", update_timeout_s=240)
    with ExitStack() as stack, Ranks() as ranks:
        senders = stage_senders("vllm", config, run_dir=folder, first_ranks=first_ranks, is_one_node=True, ranks=ranks)
        assert senders is not None
        servers = Servers(stack, senders) if ranks.rank == 0 else None
        yield ServerFleet(servers, ranks=ranks, senders=senders)  # type: ignore[arg-type]
        senders.close()


def _send_from_three_ranks(folder: Path) -> None:
    """Rank 0 is the first stage, ranks 1 and 2 the second, which gather each weight together."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = dist.new_group([1, 2])

    def gathered(version: int, failing: int | None) -> NamedWeights:
        for index, (name, weight) in enumerate(of_stage(min(rank, 1), version, num_stages=2)):
            if rank:
                dist.all_reduce(torch.ones(1), group=group)
            # What cannot be copied fails in the sender: the iterator itself goes on, as the other rank gathers with it.
            yield name, weight if (rank, index) != (failing, 5) else weight.to_sparse()

    def weights(version: int, failing: int | None = None) -> RepeatableWeights:
        return RepeatableWeights(nowhere, gather_first=nowhere, gather_stage=lambda: gathered(version, failing))

    with open_ranks(folder, [0, 1]) as fleet:
        for version in range(2):
            fleet.update_weights(weights(version), version)
            assert rank or fleet.metrics()["sync/verified_tensors"] == 40
        with pytest.raises(RuntimeError, match="another sender of weights failed: "):
            fleet.update_weights(weights(2, failing=1), 2)
        fleet.update_weights(weights(3), 3)
        assert rank or fleet.metrics()["sync/verified_tensors"] == 40
    dist.destroy_process_group()


def test_the_first_rank_of_every_stage_sends(tmp_path: Path) -> None:
    run_ranks(3, _send_from_three_ranks, tmp_path)


def _die_amid_an_update(folder: Path) -> None:
    def dying(rank: int) -> NamedWeights:
        for index, item in enumerate(of_stage(rank, num_stages=2)):
            if rank == 1 and index == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    with plain_errors(), Watchdog(folder, timeout_s=300) as dog:
        dist.init_process_group("gloo")
        with dog.watching_peers(), open_ranks(folder, [0, 1]) as fleet:
            rank = dist.get_rank()
            fleet.update_weights(RepeatableWeights(nowhere, gather_first=nowhere, gather_stage=lambda: dying(rank)), 0)


def test_a_killed_sender_ends_the_run_with_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [
        context.Process(target=rank_main, args=(rank, 2, port, _die_amid_an_update, (tmp_path,))) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    ranks[1].join(STARTED_WITHIN_S)
    started = time.monotonic()
    ranks[0].join(60)
    assert [process.exitcode for process in ranks] == [RANK_LOST, -signal.SIGKILL]
    assert time.monotonic() - started < 30
    assert "rank 1" in capfd.readouterr().err
