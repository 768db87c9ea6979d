"""`tools/launch.py`: from its command line to a run on this machine, or to a job."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from megatron_orz.command_line import plain_errors, read_command, split_options
from megatron_orz.config import Config
from megatron_orz.config.checks import require
from megatron_orz.launch.job import Nodes, Role, state_dir
from megatron_orz.launch.local import agent_command, check_machine, run_local
from megatron_orz.launch.lock import check_unlocked
from megatron_orz.launch.node import visible_gpus
from megatron_orz.launch.recipe import check_whole
from megatron_orz.launch.slurm import SlurmOptions, render, submit
from megatron_orz.recipe_file import read_recipe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Starts a recipe on this machine, on a SLURM cluster or on a Ray cluster."""

    recipe: tyro.conf.Positional[Path]
    """A file such as examples/orz_7b.py."""
    local: bool = False
    """Run on this machine."""
    slurm: bool = False
    """Write a batch script and hand it to sbatch."""
    ray: bool = False
    """Run on a Ray cluster, in the foreground; Ray places the machines' agents and starts them again."""
    ray_address: str = "auto"
    """Of the Ray cluster."""
    dry_run: bool = False
    """Check, print what would run, and stop."""
    output: Path | None = None
    """Write the batch script here, and do not submit it."""
    nodes: Annotated[Nodes, tyro.conf.OmitArgPrefixes] = field(default_factory=Nodes)
    batch: Annotated[SlurmOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=SlurmOptions)

    def __post_init__(self) -> None:
        chosen = self.local + self.slurm + self.ray
        require(chosen == 1, f"{chosen or 'none'} of --local, --slurm and --ray are given; give one of them")
        require(self.slurm or self.output is None, "--output writes a batch script; leave it out, or use --slurm")


def main(words: list[str]) -> int:
    """Returns the exit code of the run, or 0 once it is submitted."""
    own, recipe_arguments = split_options(words)
    with plain_errors():
        arguments = read_command(Arguments, own)
        recipe, nodes = arguments.recipe, arguments.nodes
        if arguments.local and nodes.gpus_per_node is None:
            nodes = replace(nodes, gpus_per_node=len(visible_gpus()) // nodes.nodes)
        config = read_recipe(recipe, recipe_arguments)
        nodes.check(config)
        if arguments.slurm:
            return start_slurm(arguments, nodes, recipe_arguments, config, command=shlex.join(lasting(words)))
        if arguments.local:
            check_machine(nodes)
        if arguments.dry_run:
            roles: list[Role] = ["servers", "trainer"] if nodes.server_nodes else ["trainer"]
            for role in roles:
                print(shlex.join(agent_command(nodes, role, recipe, recipe_arguments, config)))
            return 0
        check_unlocked(state_dir(config))
        check_whole(recipe, recipe_arguments, num_ranks=nodes.num_ranks)
        if arguments.local:
            return run_local(nodes, recipe, recipe_arguments, config)
        from megatron_orz.launch.ray_cluster import run_on_ray

        return run_on_ray(nodes, recipe, recipe_arguments, config, address=arguments.ray_address)
    return 0


def lasting(words: list[str]) -> list[str]:
    """The command line without what does not change the batch script."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--output":
            next(rest, None)
        elif word != "--dry-run" and not word.startswith("--output="):
            kept.append(word)
    return kept


def start_slurm(
    arguments: Arguments, nodes: Nodes, recipe_arguments: list[str], config: Config, *, command: str
) -> int:
    """Prints, writes or submits the batch script."""
    recipe = arguments.recipe
    script = render(
        nodes, arguments.batch, recipe, recipe_arguments, config, command=f"python tools/launch.py {command}"
    )
    if arguments.dry_run:
        print(script, end="")
    elif arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(script)
    else:
        arguments.batch.check_software()
        check_unlocked(state_dir(config))
        check_whole(recipe, recipe_arguments, num_ranks=nodes.num_ranks)
        job = submit(script, where=state_dir(config) / "job.sbatch")
        print(f"job {job} is submitted; it writes {arguments.batch.job_name or recipe.stem}-{job}.log")
    return 0
