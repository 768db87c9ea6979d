"""The grid of trainer ranks: process groups of one run, built once and passed to whoever needs them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_orz.config import ParallelConfig
from megatron_orz.engine import gradient_accumulation, platform

LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place on the tp x pp x cp x dp grid, and the groups it belongs to.

    Ranks with the same dp_rank work on the same packs; those with the same tp_rank, pp_rank and dp_rank on slices of
    the same sequences.
    """

    config: ParallelConfig
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    """Everyone who computes a part of the gradients of this rank's (dense) parameters."""

    @property
    def tp(self) -> int:
        return self.config.tp

    @property
    def pp(self) -> int:
        return self.config.pp

    @property
    def cp(self) -> int:
        return self.config.cp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def pack_multiple(self) -> int:
        """The number of tokens in a pack is a multiple of this."""
        return self.config.pack_multiple

    def dp_all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor of every data-parallel rank, stacked in their order: [...] -> [dp_size, ...]."""
        gathered = [torch.empty_like(tensor) for _ in range(self.dp_size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.dp_group)
        return torch.stack(gathered)

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last pipeline stage's `tensor`, on every stage; the others pass one of the same shape to fill."""
        if self.pp > 1:
            dist.broadcast(tensor, group=self.pp_group, group_src=self.pp - 1)
        return tensor


def _join_process_group(timeout_s: float) -> None:
    """Joins the group torchrun (or srun) describes in the environment, or a group of one.

    Ranks that are all on this machine listen on its loopback interface alone, unless GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME name another one.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "WORLD_SIZE" not in os.environ:
        _stay_on_loopback()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    is_on_loopback = os.environ["MASTER_ADDR"] in LOOPBACK
    if is_on_loopback or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        _stay_on_loopback()
    if not is_on_loopback:
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _loopback_store(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _stay_on_loopback() -> None:
    if "lo" in (name for _, name in socket.if_nameindex()):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")


def _loopback_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The rendezvous of ranks on one machine, held by torchrun or else by rank 0."""
    port = int(os.environ["MASTER_PORT"])
    listener = None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Left to itself, the store listens on every interface.
        try:
            listener = socket.create_server(("127.0.0.1", port)).detach()
        except OSError as error:
            raise RuntimeError(f"cannot listen on MASTER_PORT {port}: {error.strerror}; choose another one") from error
    return dist.TCPStore(
        "127.0.0.1", port, world_size, is_master=listener is not None, timeout=timeout, master_listen_fd=listener
    )


@contextlib.contextmanager
def open_mesh(config: ParallelConfig, *, seed: int, deterministic: bool = False) -> Iterator[Mesh]:
    """Builds the process groups, and takes them down again.

    deterministic: the process computes the same bits every time, from here on.

    Raises ValueError when the world size does not fit the layout.
    """
    config.check_world_size(int(os.environ.get("WORLD_SIZE", 1)))
    platform.install()
    gradient_accumulation.install()
    if deterministic:
        platform.make_deterministic()
    from megatron.core import parallel_state, tensor_parallel

    _join_process_group(config.timeout_s)
    try:
        with platform.megatron_calls():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=config.tp,
                pipeline_model_parallel_size=config.pp,
                virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
                context_parallel_size=config.cp,
                expert_model_parallel_size=config.ep,
                # Experts are split whole: cutting each of them as well only makes their matrices smaller.
                expert_tensor_parallel_size=1,
                distributed_timeout_minutes=max(1, round(config.timeout_s / 60)),
            )
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield Mesh(
            config=config,
            device=platform.device(),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            cp_group=parallel_state.get_context_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
