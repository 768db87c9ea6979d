"""What a run directory says of its steps: what each had to do, and the seconds it took.

Read are config.json, metrics.jsonl and the saved generations. The first step is left out: what is done once falls into
it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

from megatron_orz.generations import generations_file, read_generations
from megatron_orz.json_file import read_json
from megatron_orz.logs import METRICS_FILE, read_metrics
from megatron_orz.simulation.course import Setting
from megatron_orz.types import Metrics


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """What one step had to do, and its seconds."""

    groups: list[list[int]]
    """Response tokens of the siblings of each prompt."""
    sequence_tokens: list[int]
    """Positions of every rollout in a pack."""
    seconds: Metrics
    """`time/<span>_s` of the step."""

    @property
    def step_s(self) -> float:
        """Without evaluation, which is not simulated."""
        return sum(value for name, value in self.seconds.items() if name != "time/evaluate_s")


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run directory."""

    run_dir: Path
    setting: Setting
    num_servers: int
    gpus_per_replica: int
    max_pack_tokens: int
    num_critic_updates: int
    num_policy_updates: int
    steps: list[MeasuredStep]

    @property
    def step_s(self) -> float:
        """Of the mean step."""
        return fmean(step.step_s for step in self.steps)


def read_run(run_dir: Path) -> MeasuredRun:
    """What a run measured from its second step on. Raises ValueError for what is no run with saved generations."""
    config = read_json(run_dir / "config.json")
    try:
        ppo, fleet, grid, data = config["ppo"], config["fleet"], config["parallel"], config["data"]
        if fleet["kind"] == "local":
            raise ValueError(f"{run_dir} has no servers (fleet.kind local); give a run with fleet.kind vllm or sglang")
        replica = grid["tp"] * grid["pp"] * grid.get("cp", 1)
        trainer_gpus = grid.get("num_ranks") or replica
        num_servers = len(fleet.get("urls", [])) or fleet.get("num_servers", 1)
        colocated = bool(fleet.get("colocated", False))
        setting = Setting(
            trainer_gpus=trainer_gpus,
            server_gpus=trainer_gpus if colocated else num_servers * fleet.get("server_tp", 1),
            num_prompts=ppo["num_prompts"],
            num_responses=ppo["num_responses"],
            colocated=colocated,
            max_staleness=ppo.get("max_staleness", 0),
            oversampling=ppo.get("oversampling", 0.0),
        )
        run = MeasuredRun(
            run_dir=run_dir,
            setting=setting,
            num_servers=num_servers,
            gpus_per_replica=replica,
            max_pack_tokens=data["max_pack_tokens"],
            num_critic_updates=ppo["num_critic_updates"] if ppo.get("advantages", "gae") == "gae" else 0,
            num_policy_updates=ppo["num_policy_updates"],
            steps=[_step(run_dir, row) for row in read_metrics(run_dir / METRICS_FILE)[1:] if "time/generate_s" in row],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run_dir / 'config.json'} is not the config of a run ({error!r}); name a run's directory"
        ) from error
    if not run.steps:
        raise ValueError(f"{run_dir} has no step after its first one; give a run of at least 2 steps")
    return run


def _step(run_dir: Path, row: Metrics) -> MeasuredStep:
    path = generations_file(run_dir, int(row["step"]))
    if not path.exists():
        raise ValueError(
            f"{path} is missing: without it nobody knows how long responses were; set generations.interval 1"
        )
    groups: defaultdict[int, list[int]] = defaultdict(list)
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    for generation in read_generations(path):
        groups[generation.prompt_id].append(generation.num_response_tokens)
        tokens[generation.prompt_id].append(generation.num_prompt_tokens + generation.num_response_tokens - 1)
    seconds = {name: value for name, value in row.items() if name.startswith("time/")}
    return MeasuredStep(
        groups=list(groups.values()), sequence_tokens=list(chain.from_iterable(tokens.values())), seconds=seconds
    )
