"""A server without a model: it receives weights as a real one's worker does, and drops them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

import torch

from megatron_orz.closeable import Closeable
from megatron_orz.rollout.digests import Block, as_matrix, digest
from megatron_orz.rollout.receiving import Offer, Update, WeightReceiver

_END_TIMEOUT_S = 30.0


class BareServer(Closeable):
    """A process with one worker, and its client, which answers the requests of a weight update. A context manager.

    verifies: take digests of what is received, so that a sender can compare them.
    device, dtype: where the weights go, and in which type they are asked for.
    """

    url = "http://127.0.0.1"

    def __init__(self, *, verifies: bool = False, device: str = "cpu", dtype: str = "float32") -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._turn = Lock()
        self._num_requests = 0
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(theirs, verifies, device, dtype), daemon=True)
        self.process.start()
        theirs.close()

    def get(self, path: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """The one thing that is asked: the number of workers."""
        assert path == "/get_world_size"
        return {"world_size": 1}

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """Raises RuntimeError with what went wrong in the process, EOFError when it has died."""
        with self._turn:
            self._num_requests += 1
            self._pipe.send_bytes(json.dumps([self._num_requests, path, body]).encode())
            number = 0
            while number != self._num_requests:  # answers to requests that took too long come first
                if not self._pipe.poll(timeout_s):
                    raise TimeoutError(f"{path} took longer than {timeout_s:g} s")
                number, answer = json.loads(self._pipe.recv_bytes())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return dict(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join(_END_TIMEOUT_S)
        self._pipe.close()


def _serve(pipe: Connection, verifies: bool, device: str, dtype: str) -> None:
    torch.set_num_threads(1)
    server = _Server(verifies, torch.device(device), dtype)
    while True:
        try:
            number, path, body = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = server.answer(path, body or {})
        except Exception as error:  # whatever it is, the other side has to learn of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        pipe.send_bytes(json.dumps([number, answer]).encode())


class _Server:
    def __init__(self, verifies: bool, device: torch.device, dtype: str) -> None:
        self._verifies = verifies
        self._device = device
        self._dtype = dtype
        self._receiver: WeightReceiver | None = None
        self._held: dict[str, dict[str, Any]] = {}

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        match path:
            case "/init_weight_transfer_engine":
                self._receiver = WeightReceiver(Offer(**body["init_info"]), 0, self._device)
            case "/update_weights":
                self._receive(Update(**body["update_info"]))
            case "/collective_rpc" if body["method"] == "meet_trainer":
                return {"results": [{"dtype": self._dtype}]}
            case "/collective_rpc":
                return {"results": [{name: [self._held[name]] for name in body["args"][0]}]}
        return {"success": True}

    def _receive(self, update: Update) -> None:
        assert self._receiver is not None
        for tensors in self._receiver.buckets(update):
            for name, tensor in tensors if self._verifies else ():
                matrix = as_matrix(tensor)
                self._held[name] = {"block": Block(0, 0, *matrix.shape), "digest": digest(matrix), "place": name}
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # what was read is released next
