"""Where rollouts are generated, and how weights get there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from megatron_orz.config.checks import require
from megatron_orz.config.models import DType

FleetKind: TypeAlias = Literal["vllm", "sglang", "local"]
TransportKind: TypeAlias = Literal["auto", "ipc", "nccl", "gloo", "disk"]
Verification: TypeAlias = Literal["sampled", "full", "off"]


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Where rollouts are generated."""

    kind: FleetKind = "vllm"
    """`vllm`, `sglang`: inference servers; `local`: transformers, inside the trainer."""
    urls: tuple[str, ...] = ()
    """Servers that run already (http://host:port); none: the run starts and stops its own on its nodes."""
    num_servers: int = 1
    """Servers to start, the same number on every node of the trainer."""
    server_tp: int = 1
    """Tensor-parallel size of each server: its GPUs, or processes on the CPU."""
    gpus: tuple[int, ...] = ()
    """GPUs of the servers that are started, server_tp for each; by default the first of those a node's ranks see."""
    colocated: bool = False
    """Servers and trainer use the same GPUs in turns: servers sleep during training, the trainer is offloaded during
    generation."""
    min_servers: int = 1
    """With fewer servers than this able to answer, the run stops."""
    port: int = 0
    """Of a node's first server, the next ones follow; 0 picks free ones."""
    max_model_tokens: int = 8192
    """Longest prompt plus response a server accepts."""
    max_rollouts_in_flight: int = 2048
    """Rollouts asked of a server at a time: enough to fill its batch, as more would only wait in its queue."""
    max_running: int | None = None
    """Responses that a server which is started decodes together, if its cache has room; by default the server's own."""
    kv_cache_gib: float = 1.0
    """Memory of a server's key-value cache on the CPU."""
    cpu_threads: int | None = None
    """Threads of a server on the CPU; all cores by default. One is best for tiny models: more wait for each other."""
    gpu_memory_share: float = 0.7
    """Share of the memory of its GPUs that a server which is started may use."""
    start_timeout_s: float = 300.0
    """Deadline for a server to answer its health check after it is started."""
    request_timeout_s: float = 600.0
    """Deadline of one generation request, after which another server is asked."""
    heartbeat_timeout_s: float = 60.0
    """A server that does not answer the watch for this long is started anew."""
    stuck_timeout_s: float = 300.0
    """A server that has requests but computes no token for this long is started anew."""
    update_timeout_s: float = 300.0
    """Deadline of one weight update."""
    swaps_within_responses: bool = False
    """An update does not wait for responses under way: they go on with the new weights, which first compute anew what
    the old ones had cached. With ppo.max_staleness, and vLLM servers, which say whose weights sampled which token."""
    dtype: DType | None = None
    """Type of the weights in servers that are started; by default the policy's."""
    transport: TransportKind = "auto"
    """How weights reach the servers: `ipc` (shared memory, one machine, vLLM), `nccl`, `gloo`, or `disk` (a folder all
    see); `auto` is ipc where the run starts the servers, else nccl between GPUs and gloo between CPUs; for SGLang it is
    nccl where there are GPUs and no server is on that of rank 0, else disk."""
    delta: bool = False
    """Send only the weights that a step has changed, to bfloat16 servers of vLLM: at learning rates near 1e-6 a few per
    cent of the bytes, for the price of a copy of the weights in the memory of both sides. With transport gloo or disk;
    it pays on networks below some 6 Gbit/s."""
    verification: Verification = "sampled"
    """What of each weight update is read back from the servers and compared: `sampled` is all tensors at first, then
    every sixteenth in turn; `full` is always all. SGLang gives none back."""
    max_batch_rollouts: int = 512
    """Rollouts decoded together by the `local` fleet."""

    def __post_init__(self) -> None:
        for name in (
            *("start_timeout_s", "request_timeout_s", "heartbeat_timeout_s", "stuck_timeout_s", "update_timeout_s"),
            "kv_cache_gib",
        ):
            require(getattr(self, name) > 0, f"fleet.{name} {getattr(self, name)} is not positive")
        for name in (
            *("max_model_tokens", "max_batch_rollouts"),
            *("num_servers", "server_tp", "min_servers", "max_rollouts_in_flight"),
        ):
            require(getattr(self, name) >= 1, f"fleet.{name} {getattr(self, name)} is not at least 1")
        require(0 <= self.port <= 65535, f"fleet.port {self.port} is no port; 0 picks a free one")
        require(self.max_running is None or self.max_running >= 1, f"fleet.max_running {self.max_running} < 1")
        require(self.cpu_threads is None or self.cpu_threads >= 1, f"fleet.cpu_threads {self.cpu_threads} < 1")
        require(0 < self.gpu_memory_share < 1, f"fleet.gpu_memory_share {self.gpu_memory_share} is outside (0, 1)")
        require(
            not self.urls or self.num_servers == 1,
            f"fleet.urls names the servers, so that fleet.num_servers {self.num_servers} would start others; "
            "give one of them",
        )
        for url in self.urls:
            require(
                url.startswith(("http://", "https://")),
                f"fleet.urls holds {url!r}, which is no http:// or https:// address; give http://host:port",
            )
        require(
            not (self.colocated and self.urls),
            "fleet.colocated needs servers that the run starts on its own GPUs; leave fleet.urls empty",
        )
        require(
            not (self.colocated and self.kind == "local"),
            "fleet.colocated is about servers, and fleet.kind is local; set it to false",
        )
        require(
            not (self.colocated and self.transport == "nccl"),
            "fleet.transport is nccl, which joins no two processes on one GPU, where fleet.colocated has them; set it "
            "to auto",
        )
        require(
            self.kind == "vllm" or not self.swaps_within_responses,
            f"fleet.swaps_within_responses needs servers that say whose weights sampled a token, which fleet.kind "
            f"{self.kind} does not; set fleet.kind to vllm, or fleet.swaps_within_responses to false",
        )
        require(
            self.kind != "sglang" or self.verification != "full",
            "fleet.verification full reads every tensor back, and SGLang's servers give none; set it to off, or "
            "fleet.kind to vllm",
        )
        require(
            not self.delta or self.kind == "vllm",
            f"fleet.delta needs servers that keep a copy of the weights, which fleet.kind {self.kind} has not; set "
            "fleet.kind to vllm, or fleet.delta to false",
        )
        require(
            not self.delta or self.transport in ("gloo", "disk"),
            f"fleet.delta is for ways that are slower than finding what has changed, and fleet.transport is "
            f"{self.transport}; set it to gloo or disk, or fleet.delta to false",
        )
        require(len(set(self.urls)) == len(self.urls), f"fleet.urls {self.urls} names a server twice; name each once")
        num_servers = len(self.urls) or self.num_servers
        require(
            self.min_servers <= num_servers,
            f"fleet.min_servers {self.min_servers} exceeds the {num_servers} servers of the fleet; lower it",
        )
        require(
            not self.gpus or len(self.gpus) == self.num_servers * self.server_tp,
            f"fleet.gpus names {len(self.gpus)} GPUs, but {self.num_servers} servers of {self.server_tp} GPUs need "
            f"{self.num_servers * self.server_tp}; name as many, or none",
        )

    def of_node(self, num_nodes: int) -> FleetConfig:
        """The servers that each of several nodes starts. Raises ValueError where they cannot be spread evenly."""
        require(
            self.num_servers % num_nodes == 0,
            f"fleet.num_servers {self.num_servers} cannot be spread evenly over the {num_nodes} nodes of the ranks; "
            f"set it to a multiple of {num_nodes}",
        )
        require(
            not self.gpus or num_nodes == 1,
            f"fleet.gpus {self.gpus} names GPUs of one node, and the ranks have {num_nodes}; leave it empty",
        )
        return replace(self, num_servers=self.num_servers // num_nodes, min_servers=1)

    def check_longest(self, *, max_prompt_tokens: int, max_response_tokens: int, prompt_option: str) -> None:
        """Raises ValueError where the longest prompt and response together exceed `max_model_tokens`.

        prompt_option: what sets the length of prompts.
        """
        require(
            max_prompt_tokens + max_response_tokens <= self.max_model_tokens,
            f"a prompt of {max_prompt_tokens} tokens and a response of {max_response_tokens} exceed "
            f"fleet.max_model_tokens {self.max_model_tokens}; raise it, or lower {prompt_option} or "
            "sampling.max_response_tokens",
        )

    def server_gpus(self, index: int, *, num_gpus: int) -> tuple[int, ...]:
        """The GPUs of the `index`-th server, of the `num_gpus` the trainer sees. Raises ValueError if it lacks them."""
        gpus = self.gpus or tuple(range(self.num_servers * self.server_tp))
        require(
            max(gpus) < num_gpus,
            f"{self.num_servers} servers of {self.server_tp} GPUs use GPU {max(gpus)}, but only {num_gpus} are "
            "visible; lower fleet.num_servers or fleet.server_tp, or set fleet.gpus",
        )
        return gpus[index * self.server_tp : (index + 1) * self.server_tp]
