"""The kinds of inference servers: how each is started or found, talked to, and given new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from megatron_orz.config import FleetConfig, ModelConfig, TransportKind
from megatron_orz.ranks import Ranks
from megatron_orz.rollout.client import ServerClient
from megatron_orz.rollout.node_servers import RemoteNode, RemoteServer
from megatron_orz.rollout.receiving import Offer
from megatron_orz.rollout.replica import Running
from megatron_orz.rollout.server_group import Sender
from megatron_orz.rollout.servers import InferenceServer
from megatron_orz.rollout.sglang_client import SGLangClient
from megatron_orz.rollout.sglang_group import GroupBackend, SGLangGroupSender
from megatron_orz.rollout.sglang_sender import SGLangSender
from megatron_orz.rollout.sglang_server import sglang_launch
from megatron_orz.rollout.stage_senders import StageSender, StageSenders
from megatron_orz.rollout.transports import SERVER_ARGUMENTS, build_transport, choose_transport, is_on_loopback
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.vllm_server import vllm_launch
from megatron_orz.rollout.vllm_spans import SpanVLLMClient
from megatron_orz.rollout.weight_sender import WeightSender

ServerKind: TypeAlias = Literal["vllm", "sglang"]
Connecting = TypeVar("Connecting", WeightSender, SGLangGroupSender)


def server_runs(
    kind: ServerKind, fleet: FleetConfig, model: ModelConfig, *, run_dir: Path, nodes: Sequence[RemoteNode] = ()
) -> list[tuple[str, Callable[[int], Running]]]:
    """A name for each server, and what starts or finds it (see `Replica`). nodes: those but this one with servers."""
    if fleet.urls:
        return [(f"the server at {url}", partial(_find, kind, url, fleet)) for url in fleet.urls]
    if fleet.num_servers == 1:
        return [("the server", partial(_start, kind, None, fleet, model, run_dir))]
    share = fleet.of_node(1 + len(nodes))
    runs: list[tuple[str, Callable[[int], Running]]] = [
        (f"server {number}", partial(_start, kind, number, share, model, run_dir))
        for number in range(share.num_servers)
    ]
    for node in nodes:
        for url in node.server_urls:
            number = len(runs)
            run = partial(_start_remote, kind, number, node, url, fleet)
            runs.append((f"server {number} on node {node.name}", run))
    return runs


def weight_sender(
    kind: ServerKind, fleet: FleetConfig, model: ModelConfig, *, run_dir: Path, node: str = ""
) -> Callable[[Sequence[ServerClient]], Sender]:
    """What joins a rank and some servers for weight updates. Raises ValueError for a transport that cannot be.

    node: a folder for what this node writes, where several do.
    """
    folder, transport = run_dir / "weights" / node, choose_transport(fleet)
    if kind == "vllm":
        return partial(_connect_vllm, transport=transport, folder=folder, fleet=fleet)
    if transport == "disk":
        return partial(SGLangSender, model_path=model.path, folder=folder, timeout_s=fleet.update_timeout_s)
    assert transport in ("nccl", "gloo"), transport
    return partial(_connect_sglang, backend=transport, timeout_s=fleet.update_timeout_s)


def stage_senders(
    kind: ServerKind, fleet: FleetConfig, *, run_dir: Path, first_ranks: Sequence[int], is_one_node: bool, ranks: Ranks
) -> StageSenders | None:
    """Senders of all pipeline stages; None where rank 0 alone sends: it is the only stage, or shares memory with the
    servers, or they are of another kind, or no other node reaches them.

    first_ranks: of the stages. Raises ValueError for a GPU that an nccl group would hold twice.
    """
    transport = choose_transport(fleet)
    reaches = is_one_node or not is_on_loopback(fleet)
    if kind != "vllm" or transport == "ipc" or len(first_ranks) == 1 or not reaches:
        return None
    if transport == "nccl" and (shared := sorted(set(first_ranks) & set(fleet.gpus))) and not fleet.urls:
        raise ValueError(
            f"fleet.transport is nccl, whose groups hold every GPU once, and fleet.gpus {fleet.gpus} has {shared}, on "
            "which ranks send the weights of their pipeline stages; name others, or set fleet.transport to ipc or gloo"
        )
    folder = run_dir / "weights"
    leader = partial(_vllm_sender, transport=transport, folder=folder, fleet=fleet, num_senders=len(first_ranks))
    follower = partial(_stage_sender, transport=transport, folder=folder, fleet=fleet)
    return StageSenders(leader, follower, first_ranks=first_ranks, ranks=ranks)


def start_server(
    kind: ServerKind,
    index: int,
    fleet: FleetConfig,
    model: ModelConfig,
    *,
    log_path: Path,
    host: str = "127.0.0.1",
) -> InferenceServer:
    """Starts the `index`-th of this node's servers, at an address of this node. Raises ValueError for what cannot."""
    if kind == "sglang":
        launch = sglang_launch(model, fleet, index=index, host=host)
    else:
        launch = vllm_launch(model, fleet, index=index, transfer_arguments=SERVER_ARGUMENTS, host=host)
    return InferenceServer(launch, start_timeout_s=fleet.start_timeout_s, log_path=log_path)


def server_log(run_dir: Path, kind: ServerKind, number: int | None, num_restarts: int) -> Path:
    """What one start of a server writes. number: of the server in the run; None: it is the only one."""
    name = kind if number is None else f"{kind}-{number}"
    return run_dir / f"{name}{f'-restart-{num_restarts}' if num_restarts else ''}.log"


def server_client(kind: ServerKind, url: str, fleet: FleetConfig) -> ServerClient:
    """Talks to one server."""
    timeout_s = fleet.request_timeout_s
    if kind == "sglang":
        return SGLangClient(url, request_timeout_s=timeout_s)
    vllm_client = SpanVLLMClient if fleet.swaps_within_responses else VLLMClient
    return vllm_client(url, request_timeout_s=timeout_s)


def _find(kind: ServerKind, url: str, fleet: FleetConfig, num_restarts: int) -> Running:
    return Running(client=server_client(kind, url, fleet), process=None)


def _start(
    kind: ServerKind, number: int | None, fleet: FleetConfig, model: ModelConfig, run_dir: Path, num_restarts: int
) -> Running:
    log_path = server_log(run_dir, kind, number, num_restarts)
    process = start_server(kind, number or 0, fleet, model, log_path=log_path)
    return Running(client=server_client(kind, process.url, fleet), process=process)


def _start_remote(
    kind: ServerKind, number: int, node: RemoteNode, url: str, fleet: FleetConfig, num_restarts: int
) -> Running:
    process = RemoteServer(
        url, node=node, number=number, num_restarts=num_restarts, start_timeout_s=fleet.start_timeout_s
    )
    return Running(client=server_client(kind, url, fleet), process=process)


def _vllm_sender(
    clients: Sequence[VLLMClient], *, transport: TransportKind, folder: Path, fleet: FleetConfig, num_senders: int = 1
) -> WeightSender:
    """folder: of weights on their way over the disk."""
    return WeightSender(
        clients,
        build_transport(transport, folder=folder),
        timeout_s=fleet.update_timeout_s,
        verification=fleet.verification,
        keeps_requests=fleet.swaps_within_responses,
        delta=fleet.delta,
        num_senders=num_senders,
    )


def _connect_vllm(
    clients: Sequence[VLLMClient], *, transport: TransportKind, folder: Path, fleet: FleetConfig
) -> WeightSender:
    return _connected(_vllm_sender(clients, transport=transport, folder=folder, fleet=fleet))


def _stage_sender(
    offer: Offer, stage: int, *, transport: TransportKind, folder: Path, fleet: FleetConfig
) -> StageSender:
    half = build_transport(transport, folder=folder / f"stage-{stage}")
    return StageSender(half, offer, stage, verification=fleet.verification)


def _connect_sglang(clients: Sequence[SGLangClient], *, backend: GroupBackend, timeout_s: float) -> SGLangGroupSender:
    return _connected(SGLangGroupSender(clients, backend=backend, timeout_s=timeout_s))


def _connected(sender: Connecting) -> Connecting:
    """The sender, once it has joined the servers; closed where it cannot."""
    with ExitStack() as stack:
        stack.callback(sender.close)
        sender.connect()
        stack.pop_all()
    return sender
