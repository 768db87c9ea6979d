"""A job as a batch script for SLURM, written from one template, and its submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_orz.checkpoint.preemption import REQUEUE
from megatron_orz.command_line import HUNG, RANK_LOST
from megatron_orz.config import Config
from megatron_orz.config.checks import require
from megatron_orz.launch.job import AGENT, Container, Nodes, Role, state_dir

_SUBMIT_TIMEOUT_S = 60
_LAST_TASK_S = 180
"""How long srun waits for the other agents once one has ended; more than an agent waits for its ranks."""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What SLURM and the software of a cluster want to know."""

    job_name: str | None = None
    """By default the recipe's."""
    partition: str | None = None
    server_partition: str | None = None
    """Makes the job a heterogeneous one: a group of machines to train, and one in this partition for the servers."""
    account: str | None = None
    qos: str | None = None
    time_limit_min: int = 1440
    signal_s: int = 300
    """Seconds before the time limit at which the run is told to save a checkpoint; above checkpoint.grace_s."""
    sbatch_options: tuple[str, ...] = ()
    """More options for every group of machines, such as --constraint=h100."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    venv: Path = Path(".venv")
    """Virtual environment, seen by all machines; not used in a container."""
    container: Container = "none"
    """`pyxis`: srun --container-image (enroot); `apptainer`: apptainer exec."""
    image: str | None = None
    """Image of the container: a file, or a name that pyxis pulls."""
    mounts: tuple[str, ...] = ()
    """Host directories the container sees besides the working directory, as path or path:path."""

    def __post_init__(self) -> None:
        require(self.time_limit_min >= 1, f"--time-limit-min {self.time_limit_min} is not at least 1")
        require(
            0 < self.signal_s < 60 * self.time_limit_min,
            f"--signal-s {self.signal_s} is not within the {60 * self.time_limit_min} s of --time-limit-min; lower it",
        )
        require(
            (self.container == "none") == (self.image is None),
            f"--container {self.container} and --image {self.image} do not go together; set both or neither",
        )
        for words in (self.job_name, self.partition, self.server_partition, self.account, self.qos):
            require(
                words is None or re.fullmatch(r"[\w.,@+:-]+", words) is not None,
                f"{words!r} is no name that SLURM takes; use letters, digits, and . , @ + : - _",
            )
        for words in self.sbatch_options:
            require(
                re.fullmatch(r"--[\w-]+(=[^\s]+)?", words) is not None,
                f"--sbatch-options holds {words!r}; write each as --name or --name=value",
            )

    @property
    def image_file(self) -> bool:
        """Whether the image is a file, rather than a name in a registry."""
        return self.image is not None and (self.container == "apptainer" or self.image.endswith(".sqsh"))

    def check_software(self) -> None:
        """Raises ValueError for software that is not there. Called where the job is submitted."""
        if self.image is not None and self.image_file:
            require(Path(self.image).exists(), f"there is no image {self.image}; build it, or set --image")
        if self.container == "none":
            require(
                (self.venv / "bin/python").exists(),
                f"there is no {self.venv}/bin/python; make setup creates it, --venv names another one",
            )


def render(
    nodes: Nodes, slurm: SlurmOptions, recipe: Path, arguments: Sequence[str], config: Config, *, command: str
) -> str:
    """The batch script. command: what generates it, for its readers."""
    shape = f"{nodes.nodes} nodes" if nodes.nodes > 1 else "one node"
    if nodes.server_nodes:
        shape += f": {nodes.trainer_nodes} to train, {nodes.server_nodes} with servers"
    is_het = slurm.server_partition is not None and nodes.server_nodes > 0
    roles: list[Role] = ["trainer", "servers"] if nodes.server_nodes else ["trainer"]
    common = _common(slurm, job_name=slurm.job_name or recipe.stem)
    if is_het:
        groups = [
            [*_machines(nodes, role, config, slurm, is_het=True), *(common if role == "trainer" else [])]
            for role in roles
        ]
    else:
        groups = [[*_machines(nodes, "trainer", config, slurm, is_het=False), *common]]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    values: dict[str, Any] = {
        "recipe": recipe,
        "shape": shape,
        "command": command,
        "groups": [{"directives": group} for group in groups],
        "modules": [shlex.quote(module) for module in slurm.modules],
        "has_container": slurm.container != "none",
        "image_file": slurm.image_file,
        "image": shlex.quote(slurm.image or ""),
        "python": shlex.quote(str(slurm.venv / "bin/python")),
        "state_dir": shlex.quote(str(state_dir(config))),
        "has_servers": bool(nodes.server_nodes),
        "requeue": REQUEUE,
        "restartable": " | ".join(map(str, (REQUEUE, RANK_LOST, HUNG))),
        "max_restarts": nodes.max_restarts,
    }
    for role in roles:
        values[role] = {
            "step": _step(nodes, role, config, slurm, is_het=is_het),
            "command": shlex.join(
                [*_python(slurm), "-m", AGENT, *nodes.agent_arguments(role, recipe, arguments, config)]
            ),
        }
    return environment.get_template("job.sbatch.j2").render(values)


def submit(script: str, *, where: Path) -> str:
    """Writes the script and hands it to sbatch. Returns the job's id. Raises ValueError with what sbatch says."""
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch on this machine; submit from a login node, or use --local or --output")
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(script)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(where)], capture_output=True, text=True, timeout=_SUBMIT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"sbatch did not answer within {_SUBMIT_TIMEOUT_S} s; ask squeue before trying again"
        ) from error
    if done.returncode:
        raise ValueError(f"sbatch refused the job ({done.stderr.strip()}); set the options that it names")
    return done.stdout.strip().partition(";")[0]


def _common(slurm: SlurmOptions, *, job_name: str) -> list[str]:
    """Directives of the job as a whole."""
    return [
        f"--job-name={job_name}",
        f"--signal=B:USR1@{slurm.signal_s}",
        *("--output=%x-%j.log", "--open-mode=append", "--requeue"),
    ]


def _machines(nodes: Nodes, role: Role, config: Config, slurm: SlurmOptions, *, is_het: bool) -> list[str]:
    """Directives of a group of machines."""
    count = _count(nodes, role) if is_het else nodes.nodes
    is_servers = is_het and role == "servers"
    partition = slurm.server_partition if is_servers else slurm.partition
    names = {"partition": partition, "account": slurm.account, "qos": slurm.qos}
    directives = [
        *(f"--{name}={value}" for name, value in names.items() if value is not None),
        f"--time={slurm.time_limit_min // 60}:{slurm.time_limit_min % 60:02d}:00",
        f"--nodes={count}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(nodes, config, [role] if is_het else ['trainer', 'servers'])}",
        "--mem=0",
    ]
    gpus = [f"--gpus-per-node={nodes.gpus}"] if nodes.gpus else []
    return [*directives, *gpus, *slurm.sbatch_options]


def _step(nodes: Nodes, role: Role, config: Config, slurm: SlurmOptions, *, is_het: bool) -> str:
    """Options of srun: one agent on every node of the role, which has the whole node."""
    where = [f"--nodes={_count(nodes, role)}", f"--ntasks={_count(nodes, role)}"]
    if is_het:
        where.insert(0, f"--het-group={0 if role == 'trainer' else 1}")
    elif role == "servers":
        where.append(f"--relative={nodes.trainer_nodes}")
    cpus = _cpus(nodes, config, [role] if is_het else ["trainer", "servers"])
    options = [*where, "--ntasks-per-node=1", f"--cpus-per-task={cpus}", f"--wait={_LAST_TASK_S}"]
    if slurm.container != "pyxis":
        return shlex.join(options)
    options.append(f"--container-image={slurm.image}")
    mounts = "".join(f",{mount}" for mount in slurm.mounts)
    inside = f'--container-mounts="$PWD:$PWD"{shlex.quote(mounts) if mounts else ""} --container-workdir="$PWD"'
    return f"{shlex.join(options)} {inside}"


def _python(slurm: SlurmOptions) -> list[str]:
    if slurm.container == "apptainer":
        mounts = [word for mount in slurm.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", *mounts, str(slurm.image), "python"]
    return ["python"] if slurm.container == "pyxis" else [str(slurm.venv / "bin/python")]


def _count(nodes: Nodes, role: Role) -> int:
    return nodes.trainer_nodes if role == "trainer" else nodes.server_nodes


def _cpus(nodes: Nodes, config: Config, roles: Sequence[Role]) -> int:
    return max(nodes.num_cpus(role, config) for role in roles if _count(nodes, role))
