"""The agent of one node of a job: checks the node, finds the others, starts the processes, and ends with their code.

    python -m megatron_orz.launch.agent --role trainer --state-dir runs/demo.launch --num-nodes 2 ... -- RECIPE OPTIONS

One agent runs on every node of each role, started by srun, by Ray or by `tools/launch.py --local`. Those of the trainer
find each other and the servers through notices in the state directory (`notices.py`). In turn:

    trainer   all nodes are equal -> all-reduce and clocks -> the servers answer -> ranks
    servers   this node is as asked -> its servers answer -> their addresses are published -> until SIGUSR2 or SIGTERM

ORZ_ATTEMPT names the start of the job, and ORZ_NODE_RANK or SLURM_PROCID the node within its role.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

from megatron_orz.checkpoint.preemption import REQUEUE
from megatron_orz.command_line import INTERRUPTED, RANK_LOST, USER_ERROR, plain_errors, read_command, split_options
from megatron_orz.launch.job import Role
from megatron_orz.launch.lifeline import LOST_S, Lifeline
from megatron_orz.launch.lock import job_lock
from megatron_orz.launch.node import Node, check_equal, node_address, node_name
from megatron_orz.launch.notices import NodeError, Notices
from megatron_orz.launch.processes import END, Process, ProcessGroup, Signals
from megatron_orz.launch.servers import Share, check_answers, notice_of, run_servers
from megatron_orz.recipe_file import read_recipe
from megatron_orz.rollout.servers import choose_ports
from megatron_orz.rollout.token import TOKEN_VARIABLE

ATTEMPT, NODE_RANK = "ORZ_ATTEMPT", "ORZ_NODE_RANK"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """One node of a job; `Nodes.agent_arguments` writes them."""

    role: Role
    state_dir: Path
    num_machines: int
    """Of the job."""
    num_nodes: int
    """Of this role."""
    num_processes: int
    """Ranks or servers on this node."""
    num_servers: int
    """That the job starts on all its nodes."""
    num_gpus: int
    """That this node must have."""
    port: int
    start_timeout_s: float
    server_timeout_s: float
    """What servers may take to load their weights, beyond that."""
    min_free_gib: float
    max_skew_s: float
    interface: str | None = None


class Stopped(Exception):
    """A signal came before there was anything to save."""


class Agent:
    """One node of one start of a job."""

    def __init__(self, arguments: Arguments, recipe: Sequence[str], signals: Signals) -> None:
        """recipe: its path and options. Raises ValueError where no launcher has started this process."""
        node_rank = os.environ.get(NODE_RANK, os.environ.get("SLURM_PROCID"))
        if ATTEMPT not in os.environ or node_rank is None:
            raise ValueError(f"{ATTEMPT} or {NODE_RANK} is not set; agents are started by tools/launch.py")
        if arguments.num_servers and not os.environ.get(TOKEN_VARIABLE):
            raise ValueError(f"{TOKEN_VARIABLE} is not set; give servers and trainer the same one")
        self._arguments = arguments
        self._recipe = list(recipe)
        self._signals = signals
        self._attempt = os.environ[ATTEMPT]
        self._node_rank = int(node_rank)
        self._notices = Notices(arguments.state_dir, self._attempt)
        self._logs = arguments.state_dir / "logs" / self._attempt
        if arguments.interface is not None:
            os.environ |= {"GLOO_SOCKET_IFNAME": arguments.interface, "NCCL_SOCKET_IFNAME": arguments.interface}

    def train(self) -> int:
        """Runs the ranks of this node. Returns its exit code.

        Raises ValueError and RuntimeError for what keeps the job from starting, here or on another node.
        """
        arguments, own = self._arguments, f"trainer-node-{self._node_rank}"
        with ExitStack() as stack:
            try:
                if self._node_rank == 0:
                    stack.enter_context(job_lock(arguments.state_dir, attempt=self._attempt))
                    self._notices.remove_others()
                node = self._check_node()
                # For the run, the check (what listened there may not be gone at once), and the agents themselves.
                port = 0
                if self._node_rank == 0:
                    port = choose_ports(node.address, arguments.port, count=3, options="--master-port")
                    lifeline = Lifeline.host(node.address, port + 2, num_nodes=arguments.num_nodes)
                    stack.enter_context(lifeline)
                self._notices.publish(own, {"node": node.to_json(), "port": port})
            except (ValueError, OSError) as error:
                self._notices.publish_failure(own, str(error))
                raise
            names = [f"trainer-node-{rank}" for rank in range(arguments.num_nodes)]
            found = self._notices.wait(names, timeout_s=arguments.start_timeout_s, check=self._check_signals)
            nodes = [Node.from_json(notice["node"]) for notice in found]
            check_equal(nodes)
            address, port = nodes[0].address, found[0]["port"]
            if self._node_rank:
                lifeline = stack.enter_context(Lifeline.join(address, port + 2, node_rank=self._node_rank))
            self._say(f"{len(nodes)} nodes are here: {', '.join(other.name for other in nodes)}")
            try:
                if arguments.num_nodes * arguments.num_processes > 1:
                    self._exchange(address, port + 1)
                urls = self._find_servers(nodes[0])
            except (ValueError, RuntimeError) as error:
                self._publish_end(USER_ERROR, str(error))  # the others may have found nothing wrong
                raise
            return self._run_ranks(nodes, port, urls, lifeline)

    def serve(self) -> int:
        """Runs the servers of this node until a signal ends them. Returns its exit code."""
        arguments = self._arguments
        first = self._node_rank * arguments.num_processes
        try:
            node = self._check_node()
            config = read_recipe(Path(self._recipe[0]), self._recipe[1:])
            count = arguments.num_processes
            port = choose_ports(node.address, arguments.port, count=count, options="--server-port")
            return run_servers(
                config,
                node,
                Share(first=first, count=arguments.num_processes, port=port),
                notices=self._notices,
                logs=self._logs,
                is_stopped=lambda: bool({SIGTERM, SIGINT, END} & set(self._signals.received)),
                start_timeout_s=arguments.start_timeout_s + arguments.server_timeout_s,
            )
        except (ValueError, RuntimeError, OSError) as error:
            for server in range(first, first + arguments.num_processes):
                self._notices.publish_failure(notice_of(server), str(error))
            raise

    def _check_node(self) -> Node:
        arguments = self._arguments
        address = node_address(arguments.interface, is_alone=arguments.num_machines == 1)
        node = Node.here(address=address, run_dir=arguments.state_dir)
        node.check(num_gpus=arguments.num_gpus, min_free_gib=arguments.min_free_gib)
        return node

    def _exchange(self, address: str, port: int) -> None:
        """All ranks compute a sum together; see `exchange.py`."""
        timeout_s = self._arguments.start_timeout_s
        options = ["--timeout-s", f"{timeout_s:g}", "--max-skew-s", f"{self._arguments.max_skew_s:g}"]
        command = [sys.executable, "-m", "megatron_orz.launch.exchange", *options]
        with ProcessGroup(self._ranks(command, address, port, kind="check")) as group:
            try:
                code = group.wait(self._signals, timeout_s=2 * timeout_s)
            except TimeoutError as error:
                raise NodeError(f"the check of the nodes hangs: {error}; see {self._logs}") from error
            self._check_signals()
            if code:
                raise NodeError(f"the nodes cannot compute together: {group.describe_failure()}")

    def _find_servers(self, node: Node) -> list[str]:
        """The addresses of the job's servers. Raises ValueError and NodeError."""
        arguments = self._arguments
        if not arguments.num_servers:
            return []
        names = [notice_of(server) for server in range(arguments.num_servers)]
        timeout_s = arguments.start_timeout_s + arguments.server_timeout_s
        self._say(f"waiting for {len(names)} servers, {timeout_s:g} s at most")
        found = self._notices.wait(names, timeout_s=timeout_s, check=self._check_signals)
        for notice in found:
            node.check_same_software(Node.from_json(notice["node"]))
        urls = [notice["url"] for notice in found]
        if self._node_rank == 0:
            check_answers(urls)
        return urls

    def _run_ranks(self, nodes: Sequence[Node], port: int, urls: Sequence[str], lifeline: Lifeline) -> int:
        servers = ["--fleet.num-servers", "1", "--fleet.urls", *urls] if urls else []
        command = [sys.executable, *self._recipe, *servers]
        with ProcessGroup(self._ranks(command, nodes[0].address, port, kind="trainer")) as group:
            code = group.wait(
                self._signals, is_over=lambda: self._failed_node() is not None or lifeline.lost() is not None
            )
            failed = self._failed_node()  # before this one adds itself
            if code not in (0, REQUEUE):
                reason = group.describe_failure()
                if failed is None and (lost := lifeline.lost()) is not None:
                    reason = f"node {nodes[lost].name} is lost: no answer for {LOST_S} s, or an end without a word"
                    code = RANK_LOST
                self._publish_end(code, reason)
                if failed is not None:
                    reason = f"{failed['reason']} on node {failed['name']}; the ranks of this node are ended"
                    code = failed["code"]
                print(f"error: {reason}", file=sys.stderr, flush=True)
            return code

    def _publish_end(self, code: int, reason: str) -> None:
        """Tells the agents of the other nodes that this one cannot go on."""
        end = {"name": node_name(), "code": code, "reason": reason}
        self._notices.publish(f"trainer-end-{self._node_rank}", end)

    def _failed_node(self) -> dict[str, Any] | None:
        """What another node says of its end: connections to it may be gone without a word."""
        others = (rank for rank in range(self._arguments.num_nodes) if rank != self._node_rank)
        return next((end for rank in others if (end := self._notices.peek(f"trainer-end-{rank}")) is not None), None)

    def _ranks(self, command: Sequence[str], address: str, port: int, *, kind: str) -> list[Process]:
        """The ranks of this node. The first of the job writes where its agent does, the others into logs."""
        arguments = self._arguments
        size = arguments.num_processes
        ranks = []
        for local_rank in range(size):
            rank = self._node_rank * size + local_rank
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(arguments.num_nodes * size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            if size > 1:
                environment.setdefault("OMP_NUM_THREADS", "1")
            log = None if rank == 0 else self._logs / f"{kind}-node-{self._node_rank}-rank-{rank}.log"
            ranks.append(Process(name=f"rank {rank}", command=command, environment=environment, log=log))
        return ranks

    def _check_signals(self) -> None:
        if self._signals.received:
            raise Stopped

    def _say(self, message: str) -> None:
        if self._node_rank == 0:
            print(message, flush=True)


def main(words: Sequence[str]) -> int:
    """The command line; what is behind `--` is the recipe's."""
    own, recipe = split_options(words)
    arguments = read_command(Arguments, own)
    with plain_errors(), Signals() as signals:
        if not recipe:
            raise ValueError("no recipe is named behind --; give its path, and its options after it")
        try:
            agent = Agent(arguments, recipe, signals)
            return agent.train() if arguments.role == "trainer" else agent.serve()
        except Stopped:
            print("stopped by a signal before the ranks were started", flush=True)
            return INTERRUPTED if SIGINT in signals.received else REQUEUE
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
