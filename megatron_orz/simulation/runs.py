"""What a run directory says of its steps: what each had to do, and the seconds it took.

Read are config.json, metrics.jsonl, the saved generations and, of a run ahead, its timeline. The first step is left
out: what is done once falls into it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_orz.generations import generations_file, read_generations
from megatron_orz.json_file import read_json
from megatron_orz.logs import METRICS_FILE, read_metrics
from megatron_orz.simulation.course import Setting
from megatron_orz.simulation.spans import seconds_alone
from megatron_orz.types import Metrics

MODEL_PHASES = ("infer", "critic", "policy")
UPDATE_PARTS = ("sync/send_s", "sync/verify_s", "sync/write_s", "sync/load_s")
"""Metrics of a weight update, by whatever transport, that add up to its seconds."""


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """What one step had to do, and its seconds."""

    groups: list[list[int]]
    """Response tokens of the siblings of each prompt that was trained on."""
    sequence_tokens: list[int]
    """Positions of every rollout in a pack."""
    num_ranks: int
    """Of the trainer: tokens a second of all of them, over those of one."""
    step_s: float
    """Without evaluation, which is not simulated."""
    wait_s: float
    """The trainer waited for responses."""
    generate_s: float | None
    """From the first request to the last answer, where servers did nothing else meanwhile."""
    sync_s: float
    """Of the weight update alone."""
    switch_s: float
    """Of both changes of turns; 0 where servers have GPUs of their own."""
    phases_s: Sequence[float]
    """Of the models: infer, critic, policy."""
    rest_s: float
    """Of everything else, such as grading and recording."""

    @property
    def train_s(self) -> float:
        """Whatever is neither waiting nor an update."""
        return sum(self.phases_s) + self.rest_s


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run directory."""

    run_dir: Path
    setting: Setting
    num_servers: int
    gpus_per_server: int
    gpus_per_replica: int
    max_running: int | None
    """Responses that a server decodes together; None where that was left to the server."""
    max_pack_tokens: int
    num_critic_updates: int
    num_policy_updates: int
    steps: list[MeasuredStep]

    @property
    def step_s(self) -> float:
        """Of the mean step."""
        return fmean(step.step_s for step in self.steps)

    @property
    def num_dropped(self) -> int:
        """Prompts of a step that are asked, and not waited for."""
        return math.ceil(self.setting.num_prompts * (1 + self.setting.oversampling)) - self.setting.num_prompts


def read_run(run_dir: Path) -> MeasuredRun:
    """What a run measured from its second step on. Raises ValueError for what is no run with saved generations."""
    config = read_json(run_dir / "config.json")
    try:
        ppo, fleet, grid = config["ppo"], config["fleet"], config["parallel"]
        _check_measurable(run_dir, ppo, fleet)
        steps = _steps(run_dir, colocated=fleet["colocated"], max_staleness=ppo["max_staleness"])
        num_ranks = _num_ranks(run_dir, steps)
        num_servers = len(fleet["urls"]) or fleet["num_servers"]
        return MeasuredRun(
            run_dir=run_dir,
            setting=Setting(
                trainer_gpus=num_ranks,
                server_gpus=num_ranks if fleet["colocated"] else num_servers * fleet["server_tp"],
                num_prompts=ppo["num_prompts"],
                num_responses=ppo["num_responses"],
                colocated=fleet["colocated"],
                max_staleness=ppo["max_staleness"],
                swaps_within_responses=fleet["swaps_within_responses"],
                oversampling=ppo["oversampling"],
            ),
            num_servers=num_servers,
            gpus_per_server=fleet["server_tp"],
            gpus_per_replica=grid["tp"] * grid["pp"] * grid["cp"],
            max_running=fleet["max_running"],
            max_pack_tokens=config["data"]["max_pack_tokens"],
            num_critic_updates=ppo["num_critic_updates"] if ppo["advantages"] == "gae" else 0,
            num_policy_updates=ppo["num_policy_updates"],
            steps=steps,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run_dir} does not hold the config and the metrics of a run ({error!r}); name a run's directory"
        ) from error


def _check_measurable(run_dir: Path, ppo: Mapping[str, Any], fleet: Mapping[str, Any]) -> None:
    if fleet["kind"] == "local":
        raise ValueError(f"{run_dir} has no servers (fleet.kind local); give a run with fleet.kind vllm or sglang")
    if ppo["max_resampling_rounds"]:
        raise ValueError(
            f"{run_dir} has ppo.max_resampling_rounds: how much of its grading was generation is not known; give a run "
            "without"
        )


def _num_ranks(run_dir: Path, steps: Sequence[MeasuredStep]) -> int:
    """Of the trainer; a config does not tell how many a run was given."""
    found = {step.num_ranks for step in steps}
    if not found:
        raise ValueError(f"{run_dir} has no step after its first one; give a run of at least 2 steps")
    if len(found) > 1:
        raise ValueError(f"{run_dir} went on with other numbers of ranks ({sorted(found)}); give a run of one of them")
    return found.pop()


def _steps(run_dir: Path, *, colocated: bool, max_staleness: int) -> list[MeasuredStep]:
    rows = [row for row in read_metrics(run_dir / METRICS_FILE) if "time/generate_s" in row]
    timed_by_loop = [row["time/generate_s"] for row in rows]
    generate_s = seconds_alone(run_dir, rows) if max_staleness else timed_by_loop
    return [
        _step(run_dir, row, before, seconds, colocated=colocated, max_staleness=max_staleness)
        for (before, row), seconds in zip(pairwise(rows), generate_s[1:], strict=True)
    ]


def _step(
    run_dir: Path, row: Metrics, before: Metrics, generate_s: float | None, *, colocated: bool, max_staleness: int
) -> MeasuredStep:
    """The step of a row, which came after `before`."""
    groups, sequence_tokens = _lengths(run_dir, row)
    seconds = {name[len("time/") : -len("_s")]: value for name, value in row.items() if name.startswith("time/")}
    phases = [seconds.get(phase, 0.0) for phase in MODEL_PHASES]
    named = ("sync", "generate", "evaluate", *MODEL_PHASES)
    rest_s = sum(value for name, value in seconds.items() if name not in named)
    sync_s, wait_s = _sync(row, colocated=colocated, max_staleness=max_staleness)
    switch_s = 0.0
    if colocated:
        # The first change of turns lies around the update, the second within what first asks a model.
        switch_s = row["colocation/switch_s"] - before["colocation/switch_s"]
        if switch_s < 0:  # a resumed run counts from 0
            switch_s = row["colocation/switch_s"]
        to_trainer_s = switch_s - (seconds["sync"] - sync_s)
        asked = next((place for place, of_phase in enumerate(phases) if of_phase >= to_trainer_s), 0)
        phases[asked] -= to_trainer_s
    return MeasuredStep(
        groups=groups,
        sequence_tokens=sequence_tokens,
        num_ranks=round(sum(sequence_tokens) / row["perf/step_s"] / row["perf/tokens_per_s_per_gpu"]),
        step_s=sum(seconds.values()) - seconds.get("evaluate", 0.0),
        wait_s=seconds["generate"] + wait_s,
        generate_s=generate_s,
        sync_s=sync_s,
        switch_s=switch_s,
        phases_s=phases,
        rest_s=rest_s,
    )


def _lengths(run_dir: Path, row: Metrics) -> tuple[list[list[int]], list[int]]:
    """Response tokens of the siblings of each prompt, and positions of every rollout, in that order."""
    path = generations_file(run_dir, int(row["step"]))
    if not path.exists():
        raise ValueError(
            f"{path} is missing: without it nobody knows how long responses were; set generations.interval 1"
        )
    if row.get("generations/left_out"):
        raise ValueError(
            f"{path} lacks {row['generations/left_out']:.0f} rollouts, which are not known to be like the rest; raise "
            "generations.max_mib"
        )
    groups: defaultdict[int, list[int]] = defaultdict(list)
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    for generation in read_generations(path):
        groups[generation.prompt_id].append(generation.num_response_tokens)
        tokens[generation.prompt_id].append(generation.num_prompt_tokens + generation.num_response_tokens - 1)
    return list(groups.values()), list(chain.from_iterable(tokens.values()))


def _sync(row: Metrics, *, colocated: bool, max_staleness: int) -> tuple[float, float]:
    """Seconds of `time/sync_s` in which weights were replaced, and in which responses were waited for."""
    if not colocated and max_staleness < 2:
        wait_s = row.get("staleness/wait_s", 0.0)
        return row["time/sync_s"] - wait_s, wait_s
    # The span holds a change of turns, or a wait for responses of later steps, that no metric names.
    parts = [row[name] for name in UPDATE_PARTS if name in row]
    if not parts:
        raise ValueError(
            f"step {row['step']:.0f} has none of {', '.join(UPDATE_PARTS)}; give a run whose servers say it"
        )
    return sum(parts), 0.0 if colocated else row["time/sync_s"] - sum(parts)
