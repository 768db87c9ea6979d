"""A job on this machine: the same agents, without a scheduler."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_orz.config import Config
from megatron_orz.config.checks import require
from megatron_orz.launch.agent import ATTEMPT, NODE_RANK
from megatron_orz.launch.job import AGENT, Nodes, Role
from megatron_orz.launch.node import visible_gpus
from megatron_orz.launch.processes import Process, ProcessGroup, Signals
from megatron_orz.rollout.token import TOKEN_VARIABLE


def check_machine(nodes: Nodes) -> None:
    """Raises ValueError when this machine has too little for the job."""
    require(
        nodes.trainer_nodes == 1 and nodes.server_nodes <= 1,
        f"--local has one machine, and --nodes {nodes.nodes} with --server-nodes {nodes.server_nodes} asks for more; "
        "it can play one that trains, and one with servers",
    )
    has, needs = len(visible_gpus()), nodes.gpus * nodes.nodes
    require(
        has >= needs, f"the job needs {needs} GPUs, and this machine has {has}; lower --gpus-per-node, or use --slurm"
    )
    num_cpus = len(os.sched_getaffinity(0))
    require(
        nodes.gpus > 0 or nodes.ranks <= num_cpus,
        f"{nodes.ranks} ranks without GPUs need as many CPU cores, and this machine has {num_cpus}; lower "
        "--ranks-per-node",
    )


def agent_environment(attempt: str, token: str, node_rank: int) -> dict[str, str]:
    """What an agent has to know beside its arguments."""
    return {ATTEMPT: attempt, NODE_RANK: str(node_rank), TOKEN_VARIABLE: token}


def agent_command(nodes: Nodes, role: Role, recipe: Path, arguments: Sequence[str], config: Config) -> list[str]:
    """What starts an agent on this machine."""
    return [sys.executable, "-m", AGENT, *nodes.agent_arguments(role, recipe, arguments, config)]


def run_local(nodes: Nodes, recipe: Path, arguments: Sequence[str], config: Config) -> int:
    """Runs the job on this machine. Returns the trainer's exit code."""
    environment = agent_environment(f"local-{os.getpid()}.{int(time.time())}", secrets.token_urlsafe(32), 0)
    trainer = _agent("trainer", nodes, recipe, arguments, config, environment)
    servers = [_agent("servers", nodes, recipe, arguments, config, environment)] if nodes.server_nodes else []
    # The servers outlive the trainer, and end with the block.
    with Signals() as signals, ProcessGroup(servers), ProcessGroup([trainer]) as group:
        return group.wait(signals)


def _agent(
    role: Role, nodes: Nodes, recipe: Path, arguments: Sequence[str], config: Config, environment: Mapping[str, str]
) -> Process:
    command = agent_command(nodes, role, recipe, arguments, config)
    gpus = {}
    if nodes.server_nodes and nodes.gpus:
        first = 0 if role == "trainer" else nodes.gpus
        gpus["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + nodes.gpus)))
    return Process(name=role, command=command, environment={**os.environ, **environment, **gpus}, log=None)
