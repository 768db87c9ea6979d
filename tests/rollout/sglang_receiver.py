"""SGLang's end of a weight update without SGLang: processes that join the group and receive as its workers do.

The calls of torch.distributed, their order and their arguments are those of SGLang 0.5.23's `init_custom_process_group`
and `WeightUpdater`; what is received is kept.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_orz.rollout.servers import RefusedError, UnreachableError
from megatron_orz.types import NamedWeights

_TIMEOUT = timedelta(seconds=240)


def fingerprints(weights: NamedWeights, *, dtype: torch.dtype) -> dict[str, str]:
    """Type, shape and bytes of every tensor."""
    return {
        name: f"{dtype} {list(weight.shape)} "
        + hashlib.sha256(weight.to(dtype).cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, weight in weights
    }


class ReceivingServer:
    """A server of several tensor-parallel ranks, each a process, and the client of it; a context manager."""

    url = "http://127.0.0.1"

    def __init__(self, *, tp_size: int = 1, dtype: str = "float32", device: str = "cpu", **layout: int) -> None:
        """layout: other sizes that /server_info tells of."""
        self.info = {"tp_size": tp_size, "pp_size": 1, "dp_size": 1, "dtype": dtype, **layout}
        self._turn = Lock()
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        for rank in range(tp_size):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_work, args=(theirs, rank, device), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self._pipes.append(ours)

    def get(self, path: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        assert path == "/server_info"
        return self.info

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """Raises RefusedError with the message of what a worker does not do, as SGLang's 400 would."""
        with self._turn:
            for pipe in self._pipes:
                pipe.send((path, dict(body or {})))
            answers: list[tuple[bool, Any]] = []
            for pipe in self._pipes:
                try:
                    if not pipe.poll(timeout_s):
                        raise UnreachableError(f"{path} took longer than {timeout_s:g} s")
                    answers.append(pipe.recv())
                except (EOFError, ConnectionError) as error:
                    raise UnreachableError(f"the connection broke during {path}") from error
        if not all(success for success, _ in answers):
            raise RefusedError(" | ".join(str(message) for _, message in answers))
        return {"success": True, "ranks": [message for _, message in answers]}

    def held(self) -> list[dict[str, str]]:
        """The fingerprints of what each rank has received."""
        ranks: list[dict[str, str]] = self.post("/held")["ranks"]
        return ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            process.join(30)


def _work(pipe: Connection, tp_rank: int, device: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # SGLang's workers have a default group of their own, which must not get in the way.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    worker = _Worker(tp_rank, torch.device(device))
    while True:
        try:
            path, body = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, worker.answer(path, body)
        except Exception as error:  # whatever it is, the other side has to learn of it
            answer = False, f"{type(error).__name__}: {error}"
        pipe.send(answer)


class _Worker:
    def __init__(self, tp_rank: int, device: torch.device) -> None:
        self._tp_rank = tp_rank
        self._device = device
        self._groups: dict[str, Any] = {}
        self._held: dict[str, str] = {}
        self._has_session = False
        self._version = ""

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        match path:
            case "/init_weights_update_group":
                self._groups[body["group_name"]] = self._join(**body)
            case "/destroy_weights_update_group":
                dist.destroy_process_group(self._groups.pop(body["group_name"]))
            case "/begin_weight_update":
                assert not self._has_session, "a weight-update session is already open"
                self._has_session = True
            case "/update_weights_from_distributed":
                assert self._has_session, "update_weights_from_distributed must run between begin and end"
                self._receive(**body)
            case "/end_weight_update":
                assert self._has_session, "no weight-update session is open"
                self._has_session = False
            case "/update_weight_version":
                assert not body["abort_all_requests"]
                self._version = body["new_version"]
            case "/held":
                return self._held | {"version": self._version, "groups": " ".join(self._groups)}
            case _:
                raise LookupError(path)
        return "Success"

    def _join(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> Any:
        rank = rank_offset + self._tp_rank
        store, rank, size = next(
            c10d.rendezvous(f"tcp://{master_address}:{master_port}", rank, world_size, timeout=_TIMEOUT)
        )
        store.set_timeout(_TIMEOUT)
        group, _ = c10d._new_process_group_helper(
            size,
            rank,
            [],
            dist.Backend(backend),
            dist.PrefixStore(group_name, store),
            group_name=c10d.GroupName(group_name),
            backend_options=None,
            timeout=_TIMEOUT,
            device_id=None,
        )
        c10d._world.pg_group_ranks[group] = {index: index for index in range(size)}
        return group

    def _receive(
        self,
        *,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        load_format: str,
        flush_cache: bool,
    ) -> None:
        assert (load_format, flush_cache) == ("flattened_bucket", True)
        if "refused" in names:
            raise ValueError("refused")
        sizes = [
            torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        payload = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        dist.broadcast(payload, src=0, group=self._groups[group_name])
        for name, dtype, shape, part in zip(names, dtypes, shapes, payload.split(sizes), strict=True):
            received = getattr(torch, dtype)
            self._held |= fingerprints(iter([(name, part.view(received).reshape(shape))]), dtype=received)
