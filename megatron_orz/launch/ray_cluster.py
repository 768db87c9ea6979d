"""A job on a Ray cluster. Ray only places the agents on machines, and starts them again; it carries no data."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_orz.checkpoint.preemption import REQUEUE
from megatron_orz.command_line import HUNG, RANK_LOST
from megatron_orz.config import Config
from megatron_orz.launch.job import Nodes, Role
from megatron_orz.launch.local import agent_command, agent_environment
from megatron_orz.launch.processes import Process, ProcessGroup, Signals

_POLL_S = 1.0
_END_S = 60.0
RESTARTABLE = (REQUEUE, RANK_LOST, HUNG)


class RemoteAgent:
    """The agent of one machine, in a Ray actor on it."""

    def __init__(self) -> None:
        self._signals = Signals()

    def run(self, command: Sequence[str], directory: str, environment: Mapping[str, str]) -> int:
        """Runs the agent in `directory`, which all machines share. Returns its exit code."""
        os.chdir(directory)
        # Ray hides GPUs that were not asked for by setting CUDA_VISIBLE_DEVICES, which the agent inherits.
        process = Process(name="agent", command=command, environment={**os.environ, **environment}, log=None)
        with ProcessGroup([process]) as group:
            return group.wait(self._signals)

    def tell(self, number: int) -> None:
        """Passes a signal to the agent, once it runs."""
        self._signals.received.append(number)


def run_on_ray(nodes: Nodes, recipe: Path, arguments: Sequence[str], config: Config, *, address: str) -> int:
    """Runs the job on a Ray cluster, restarts included. Returns the trainer's exit code.

    address: of the cluster. Raises ValueError when it has too few machines of the size asked for.
    """
    try:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    except ImportError as error:
        raise ValueError(f"--ray needs Ray ({error}); install megatron_orz[ray]") from error
    try:
        ray.init(address=address, log_to_driver=True, logging_level="warning")
    except ConnectionError as error:
        raise ValueError(
            f"there is no Ray cluster at {address} ({error}); ray start --head, or set --ray-address"
        ) from error
    roles: list[tuple[Role, int]] = [("trainer", rank) for rank in range(nodes.trainer_nodes)]
    roles += [("servers", rank) for rank in range(nodes.server_nodes)]
    bundles = [_resources(nodes, role, config) for role, _ in roles]
    try:
        check_cluster(bundles, ray.nodes())
        group = placement_group(bundles, strategy="STRICT_SPREAD")
        try:
            if not group.wait(nodes.start_timeout_s):
                raise ValueError(
                    f"Ray did not free {len(bundles)} machines within --start-timeout-s {nodes.start_timeout_s:g} s; "
                    "ray status tells who has them"
                )
            strategies = [
                PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
                for index in range(len(bundles))
            ]
            return _attempts(ray, nodes, roles, bundles, strategies, recipe, arguments, config)
        finally:
            remove_placement_group(group)
    finally:
        ray.shutdown()


def check_cluster(bundles: Sequence[Mapping[str, float]], machines: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError when the live machines of a cluster cannot hold a bundle each.

    machines: as `ray.nodes()` describes them.
    """
    alive = [machine for machine in machines if machine["Alive"]]
    for bundle in bundles:
        fit = [m for m in alive if all(m["Resources"].get(name, 0) >= amount for name, amount in bundle.items())]
        if len(fit) < len(bundles):
            wanted = ", ".join(f"{amount:g} {name}s" for name, amount in bundle.items())
            raise ValueError(
                f"the job needs {len(bundles)} machines with {wanted}, and {len(fit)} of the cluster's {len(alive)} "
                "have them; lower --nodes, --gpus-per-node or --cpus-per-node"
            )


def _attempts(
    ray: Any,
    nodes: Nodes,
    roles: Sequence[tuple[Role, int]],
    bundles: Sequence[Mapping[str, float]],
    strategies: Sequence[Any],
    recipe: Path,
    arguments: Sequence[str],
    config: Config,
) -> int:
    """Runs attempt after attempt, until one ends for good. A signal to this process stops the last one in order."""
    token, started = secrets.token_urlsafe(32), int(time.time())
    with Signals() as signals:
        for attempt in range(nodes.max_restarts + 1):
            name = f"ray-{os.getpid()}.{attempt}.{started}"
            agents = []
            for bundle, strategy in zip(bundles, strategies, strict=True):
                agent = ray.remote(RemoteAgent).options(
                    num_cpus=bundle["CPU"],
                    num_gpus=bundle.get("GPU", 0),
                    max_concurrency=2,
                    scheduling_strategy=strategy,
                )
                agents.append(agent.remote())
            runs = {
                agent.run.remote(
                    agent_command(nodes, role, recipe, arguments, config),
                    os.getcwd(),
                    agent_environment(name, token, rank),
                ): role
                for agent, (role, rank) in zip(agents, roles, strict=True)
            }
            code = _wait(ray, agents, roles, runs, signals)
            for agent in agents:
                ray.kill(agent)
            if signals.received or code not in RESTARTABLE:
                return code
            print(f"attempt {name} ended with {code}; starting again", flush=True)
    return code


def _wait(
    ray: Any, agents: Sequence[Any], roles: Sequence[tuple[Role, int]], runs: Mapping[Any, Role], signals: Signals
) -> int:
    """The trainer's exit code: the highest of its machines, RANK_LOST where one is gone. Ends the servers."""
    running, codes, num_told = list(runs), [], 0
    deadline = float("inf")
    while any(runs[run] == "trainer" for run in running) and time.monotonic() < deadline:
        for number in signals.received[num_told:]:
            for agent, (role, _) in zip(agents, roles, strict=True):
                if role == "trainer":
                    agent.tell.remote(number)
        num_told = len(signals.received)
        done, running = ray.wait(running, timeout=_POLL_S)
        for run in done:
            try:
                code = ray.get(run, timeout=_END_S)
            except ray.exceptions.RayError as error:
                print(f"a machine of the {runs[run]} is lost: {type(error).__name__}", flush=True)
                code = RANK_LOST
            if runs[run] == "trainer":
                codes.append(code)
                if code:
                    deadline = min(deadline, time.monotonic() + 2 * _END_S)
    for agent, (role, _) in zip(agents, roles, strict=True):
        if role == "servers":
            agent.tell.remote(int(signal.SIGTERM))
    if running:
        ray.wait(running, num_returns=len(running), timeout=_END_S)
    return max(codes, default=RANK_LOST)


def _resources(nodes: Nodes, role: Role, config: Config) -> dict[str, float]:
    resources = {"CPU": float(nodes.num_cpus(role, config))}
    return resources | ({"GPU": float(nodes.gpus)} if nodes.gpus else {})
