"""New weights for SGLang servers, by way of a checkpoint directory that trainer and servers can read."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.sglang_client import SGLangClient
from megatron_orz.types import Metrics, NamedWeights

MAX_SHARD_BYTES = 2 * 2**30
_COMPANIONS = ("config.json", "generation_config.json")


class SGLangSender:
    """Writes the weights once, and has every server load them.

    model_path: the checkpoint the servers started from, whose config goes with the weights.
    folder: where the weights are written for a moment; a shared filesystem when the servers run elsewhere.
    timeout_s: deadline of loading.
    """

    def __init__(self, clients: Sequence[SGLangClient], *, model_path: Path, folder: Path, timeout_s: float) -> None:
        self._clients = clients
        self._model_path = model_path
        self._folder = folder
        self._timeout_s = timeout_s
        self._metrics: Metrics = {}

    def send(self, weights: NamedWeights, version: int) -> None:
        """Gives the servers new weights; raises ServerError when one of them did not take them."""
        start = time.perf_counter()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=f"weights-{version}-") as directory:
                _write(weights, Path(directory), companions_of=self._model_path)
                written = time.perf_counter()
                with ThreadPoolExecutor(len(self._clients), "weights") as threads:
                    loads = [
                        threads.submit(client.load, str(Path(directory).resolve()), version, timeout_s=self._timeout_s)
                        for client in self._clients
                    ]
                    for load in loads:
                        load.result()
        except OSError as error:
            raise ServerError(f"cannot write the weights to {self._folder}: {error}; free some space") from error
        self._metrics = {"sync/write_s": written - start, "sync/load_s": time.perf_counter() - written}

    def metrics(self) -> Metrics:
        """Seconds of the last update: writing the weights, then loading them."""
        return self._metrics

    def close(self) -> None:
        """Nothing stays open between updates."""


def _write(weights: NamedWeights, directory: Path, *, companions_of: Path) -> None:
    """Shards of at most `MAX_SHARD_BYTES`, as long as no tensor is larger. No index: loaders read all shards."""
    for name in _COMPANIONS:
        if (companions_of / name).is_file():
            shutil.copy(companions_of / name, directory / name)
    shard: dict[str, Tensor] = {}
    num_shards = num_bytes = 0

    def flush() -> None:
        save_file(shard, directory / f"model-{num_shards:05d}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, weight in weights:
        if shard and num_bytes + weight.nbytes > MAX_SHARD_BYTES:
            flush()
            num_shards, num_bytes = num_shards + 1, 0
        # A copy: the tensor may share memory with what comes next.
        shard[name] = weight.detach().to("cpu", copy=True).contiguous()
        num_bytes += weight.nbytes
    flush()
