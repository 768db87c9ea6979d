"""A job: a recipe, the nodes it is to run on, and what runs where. Checked before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from megatron_orz.config import Config
from megatron_orz.config.checks import require

Container: TypeAlias = Literal["none", "pyxis", "apptainer"]
Role: TypeAlias = Literal["trainer", "servers"]

AGENT = "megatron_orz.launch.agent"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a job, and what every start of it checks."""

    nodes: int = 1
    """Machines of the job, those of the servers included."""
    server_nodes: int = 0
    """Of these, machines that run inference servers and nothing else; 0 leaves the servers to the recipe."""
    gpus_per_node: int | None = None
    """GPUs of every machine; 0 for machines without. By default 8, or with --local those of this machine."""
    cpus_per_node: int = 0
    """CPU cores asked for on every machine; 0 asks for 8 with every GPU, or for one with every process."""
    ranks_per_node: int = 0
    """Trainer ranks on every machine that trains; 0 is one for every GPU, or a single one without GPUs."""
    servers_per_node: int = 0
    """Servers on every machine that runs servers; 0 is as many as its GPUs hold (fleet.server_tp), or a single one."""
    interface: str | None = None
    """Network interface over which the machines talk, such as ib0 or eth0; by default that of the host's name."""
    master_port: int = 0
    """Port at which the ranks meet, on the first machine that trains, the next two are the launcher's; 0 picks free
    ones."""
    server_port: int = 0
    """Port of a machine's first server, the next ones follow; 0 picks free ones."""
    start_timeout_s: float = 600.0
    """Deadline for all machines to come, and for the checks of them."""
    min_free_gib: float = 20.0
    """Space there must be where the run writes."""
    max_skew_s: float = 1.0
    """Largest difference between the clocks of two machines."""
    max_restarts: int = 100
    """Times a job that was stopped, or has lost a rank or hung, is started again by the scheduler."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, f"--nodes {self.nodes} is not at least 1")
        require(
            self.gpus_per_node is None or self.gpus_per_node >= 0,
            f"--gpus-per-node {self.gpus_per_node} is negative; give at least 0",
        )
        for name in (
            *("server_nodes", "cpus_per_node", "ranks_per_node", "servers_per_node", "max_restarts"),
            *("min_free_gib", "master_port", "server_port"),
        ):
            require(getattr(self, name) >= 0, f"{option(name)} {getattr(self, name)} is negative; give at least 0")
        for name in ("start_timeout_s", "max_skew_s"):
            require(
                0 < getattr(self, name) <= 86400,
                f"{option(name)} {getattr(self, name):g} is no deadline: give more than 0 and at most 86400 s",
            )
        for name in ("master_port", "server_port"):
            require(
                getattr(self, name) <= 65535, f"{option(name)} {getattr(self, name)} is no port; 0 picks a free one"
            )
        require(
            self.server_nodes < self.nodes,
            f"--server-nodes {self.server_nodes} leaves none of --nodes {self.nodes} to the trainer; raise --nodes",
        )

    @property
    def gpus(self) -> int:
        """Of every machine."""
        return 8 if self.gpus_per_node is None else self.gpus_per_node

    @property
    def trainer_nodes(self) -> int:
        return self.nodes - self.server_nodes

    @property
    def ranks(self) -> int:
        """Of one machine that trains."""
        return self.ranks_per_node or max(1, self.gpus)

    @property
    def num_ranks(self) -> int:
        """Of the job."""
        return self.trainer_nodes * self.ranks

    def servers(self, config: Config) -> int:
        """Of one machine that runs servers."""
        return self.servers_per_node or max(1, self.gpus // config.fleet.server_tp)

    def num_servers(self, config: Config) -> int:
        """That the job starts; those the recipe starts by itself do not count."""
        return self.server_nodes * self.servers(config)

    def num_cpus(self, role: Role, config: Config) -> int:
        """CPU cores that one machine of a role is asked for."""
        if self.cpus_per_node:
            return self.cpus_per_node
        if self.gpus:
            return 8 * self.gpus
        return self.ranks if role == "trainer" else self.servers(config)

    def check(self, config: Config) -> None:
        """Raises ValueError when the machines do not fit the recipe, which is not started then."""
        fleet = config.fleet
        try:
            config.parallel.check_world_size(self.num_ranks)
        except ValueError as error:
            shape = f"{self.trainer_nodes} nodes of {self.ranks} ranks do not fit the recipe"
            raise ValueError(f"{shape}: {error}; or set --nodes or --ranks-per-node") from error
        require(
            self.gpus == 0 or self.ranks <= self.gpus,
            f"--ranks-per-node {self.ranks} needs as many GPUs, and a node has --gpus-per-node {self.gpus}; "
            "set one of them",
        )
        if self.server_nodes:
            self._check_servers(config)
            return
        if fleet.kind == "local" or fleet.urls:
            return
        servers = fleet.of_node(self.nodes).num_servers
        require(
            self.gpus == 0 or servers * fleet.server_tp <= self.gpus,
            f"the recipe starts {servers} servers of {fleet.server_tp} GPUs beside the ranks of every node, which has "
            f"--gpus-per-node {self.gpus}; lower fleet.num_servers or fleet.server_tp, or give the servers nodes of "
            "their own: --server-nodes",
        )

    def _check_servers(self, config: Config) -> None:
        fleet = config.fleet
        require(
            fleet.kind == "vllm",
            f"--server-nodes {self.server_nodes} starts vLLM servers, and fleet.kind is {fleet.kind}; set one of them",
        )
        require(
            not fleet.colocated,
            f"fleet.colocated takes turns on the trainer's GPUs, and --server-nodes {self.server_nodes} gives the "
            "servers their own; set one of them",
        )
        servers = self.servers(config)
        needed = servers * fleet.server_tp
        require(
            self.gpus == 0 or needed <= self.gpus,
            f"{servers} servers of fleet.server_tp {fleet.server_tp} need {needed} GPUs of a node, which has "
            f"--gpus-per-node {self.gpus}; lower --servers-per-node or fleet.server_tp",
        )
        require(
            fleet.min_servers <= self.num_servers(config),
            f"fleet.min_servers {fleet.min_servers} exceeds the {self.num_servers(config)} servers of the job; lower "
            "it, or raise --server-nodes",
        )

    def agent_arguments(self, role: Role, recipe: Path, arguments: Sequence[str], config: Config) -> list[str]:
        """The command line of a node's agent, behind `python -m megatron_orz.launch.agent`."""
        is_trainer = role == "trainer"
        options: dict[str, object] = {
            "role": role,
            "state_dir": state_dir(config),
            "num_machines": self.nodes,
            "num_nodes": self.trainer_nodes if is_trainer else self.server_nodes,
            "num_processes": self.ranks if is_trainer else self.servers(config),
            "num_servers": self.num_servers(config),
            "num_gpus": self.gpus,
            "port": self.master_port if is_trainer else self.server_port,
            "start_timeout_s": self.start_timeout_s,
            "server_timeout_s": config.fleet.start_timeout_s,
            "min_free_gib": self.min_free_gib,
            "max_skew_s": self.max_skew_s,
        }
        if self.interface is not None:
            options["interface"] = self.interface
        words = [word for name, value in options.items() for word in (option(name), _text(value))]
        return [*words, "--", str(recipe), *arguments]


def state_dir(config: Config) -> Path:
    """What the launcher keeps of a run: lock, notices, logs. Beside the run directory, which a run may set aside."""
    return config.run_dir.with_name(f"{config.run_dir.name}.launch")


def option(name: str) -> str:
    """A field as an option of the command line."""
    return f"--{name.replace('_', '-')}"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
