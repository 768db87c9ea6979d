"""A profile from measured runs: speeds and costs that fit what their steps took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from megatron_orz.simulation.course import critical_tokens
from megatron_orz.simulation.profile import Decoding, Profile, Training
from megatron_orz.simulation.runs import MeasuredRun, MeasuredStep
from megatron_orz.simulation.servers import generation_seconds

LEAST_VARIATION = 1.5
"""A cost per iteration or update is told from one per token where their ratio differs by this factor between steps."""
RUNNING_ON_CPU = 128
"""Responses that a vLLM server on the CPU runs together (its default of max_num_seqs)."""
NOT_TOLD_APART = "all of it per token: runs of one size do not tell that from a cost of every"


def measured_profile(runs: Sequence[MeasuredRun]) -> Profile:
    """Speeds and costs that fit the steps of synchronous runs best, relative to what each took.

    Generation is  iterations x iteration_s + tokens x response_s, training  tokens x (infer_s + critic_s + policy_s) +
    updates x update_s. Runs of one size do not tell the two terms of either sum apart: all is then put on the tokens.

    Raises ValueError for runs in which generation lay beside training or was cut short, or of unlike layouts.
    """
    for run in runs:
        if run.setting.max_staleness or run.setting.oversampling or run.setting.colocated:
            raise ValueError(
                f"{run.run_dir} has ppo.max_staleness, ppo.oversampling or fleet.colocated, so that its generation was "
                "not timed alone; fit on runs without them"
            )
    first = runs[0]
    server_gpus = first.setting.server_gpus // first.num_servers
    for run in runs[1:]:
        if run.gpus_per_replica != first.gpus_per_replica or run.max_pack_tokens != first.max_pack_tokens:
            raise ValueError(
                f"{run.run_dir} and {first.run_dir} differ in the size of a replica or of a pack; give runs that do not"
            )
    steps = [(run, step) for run in runs for step in run.steps]
    decoding, server_spread, of_decoding = _fit_decoding(steps)
    training, trainer_spread, of_training = _fit_training(steps)
    measured = f"{len(steps)} steps of {', '.join(str(run.run_dir) for run in runs)}"
    prompt_tokens = fmean(
        total - length + 1
        for _, step in steps
        for total, length in zip(step.sequence_tokens, chain.from_iterable(step.groups), strict=True)
    )
    of_config = f"config.json of {first.run_dir}"
    return Profile(
        name=" + ".join(run.run_dir.name for run in runs),
        groups=[group for _, step in steps for group in step.groups],
        prompt_tokens=prompt_tokens,
        num_prompts=first.setting.num_prompts,
        num_responses=first.setting.num_responses,
        max_pack_tokens=first.max_pack_tokens,
        decoding=decoding,
        training=training,
        gpus_per_server=server_gpus,
        gpus_per_replica=first.gpus_per_replica,
        sync_s=fmean(step.seconds["time/sync_s"] for _, step in steps),
        rollout_s=_rest_of_a_rollout(steps),
        switch_s=0.0,
        trainer_spread=trainer_spread,
        server_spread=server_spread,
        sources={
            "groups": f"saved generations, {measured}",
            "prompt_tokens": f"mean of the saved generations, {measured}",
            "num_prompts": of_config,
            "num_responses": of_config,
            "max_pack_tokens": of_config,
            "decoding": f"time/generate_s, {measured}; {of_decoding}; max_running: vLLM's default on the CPU",
            "training": f"time/infer_s, critic_s, policy_s, {measured}; {of_training}",
            "gpus_per_server": of_config,
            "gpus_per_replica": of_config,
            "sync_s": f"mean of time/sync_s, {measured}",
            "rollout_s": f"all other time/*_s but evaluate_s over the rollouts, {measured}",
            "switch_s": "not measured by runs that are not colocated: 0",
            "trainer_spread": f"measured over fitted seconds of training, {measured}",
            "server_spread": f"measured over fitted seconds of generation, {measured}",
        },
    )


def _fit_decoding(steps: Sequence[tuple[MeasuredRun, MeasuredStep]]) -> tuple[Decoding, list[float], str]:
    """Seconds of an iteration and of a response in it; measured over fitted seconds; what the fit could tell."""
    units = [Decoding(iteration_s=1.0 - each, response_s=each, max_running=RUNNING_ON_CPU) for each in (0.0, 1.0)]
    counts = np.array(
        [[generation_seconds(unit, step.groups, num_servers=run.num_servers) for unit in units] for run, step in steps]
    )
    seconds = np.array([step.seconds["time/generate_s"] for _, step in steps])
    told_apart = _varies(counts[:, 1] / counts[:, 0])
    costs = nonnegative_fit(counts, seconds, columns=[0, 1] if told_apart else [1])
    decoding = Decoding(iteration_s=costs[0], response_s=costs[1], max_running=RUNNING_ON_CPU)
    remark = "fitted over batches of several sizes" if told_apart else f"{NOT_TOLD_APART} iteration"
    return decoding, _spread(seconds, counts @ costs), remark


def _fit_training(steps: Sequence[tuple[MeasuredRun, MeasuredStep]]) -> tuple[Training, list[float], str]:
    """As `_fit_decoding`, of (infer_s, critic_s, policy_s, update_s)."""
    rows, seconds, ratios = [], [], []
    for run, step in steps:
        updates = (1, run.num_critic_updates, run.num_policy_updates)
        num_replicas = run.setting.trainer_gpus // run.gpus_per_replica
        tokens = critical_tokens(tuple(step.sequence_tokens), run.max_pack_tokens, num_replicas, updates)
        for column, phase in enumerate(("infer", "critic", "policy")):
            row = [0.0] * 4
            row[column] = tokens[column] * run.gpus_per_replica
            if phase != "infer":
                row[3] = updates[column]
                ratios.append(tokens[column] / max(1, updates[column]))
            rows.append(row)
            seconds.append(step.seconds.get(f"time/{phase}_s", 0.0))
    counts, observed = np.array(rows), np.array(seconds)
    # The sizes of mini-batches of critic and policy differ in any case: those of one model must.
    told_apart = _varies(np.array(ratios[0::2])) or _varies(np.array(ratios[1::2]))
    costs = nonnegative_fit(counts, observed, columns=[0, 1, 2, 3] if told_apart else [0, 1, 2])
    run = steps[0][0]
    training = Training(
        infer_s=costs[0],
        critic_s=costs[1],
        policy_s=costs[2],
        update_s=costs[3],
        num_critic_updates=run.num_critic_updates,
        num_policy_updates=run.num_policy_updates,
    )
    remark = "fitted over steps of several sizes" if told_apart else f"{NOT_TOLD_APART} update"
    return training, _spread(_by_step(observed), _by_step(counts @ costs)), remark


def nonnegative_fit(
    counts: NDArray[np.float64], seconds: NDArray[np.float64], *, columns: Sequence[int]
) -> NDArray[np.float64]:
    """Costs >= 0 with  counts @ costs = seconds  by least squares of the relative errors; 0 outside of `columns`.

    counts: [rows, costs]; seconds: [rows], of which those that are 0 say nothing. Every subset of the few columns is
    fitted, and the best one without a negative cost is the minimum (a solution of the constrained problem solves the
    unconstrained one over the columns where it is positive).
    """
    is_used = seconds > 0
    scaled, ones = counts[is_used] / seconds[is_used, None], np.ones(int(is_used.sum()))
    best, least = np.zeros(counts.shape[1]), float(len(ones))
    for subset in chain.from_iterable(combinations(columns, size) for size in range(1, len(columns) + 1)):
        chosen, *_ = np.linalg.lstsq(scaled[:, list(subset)], ones, rcond=None)
        residual = float(((scaled[:, list(subset)] @ chosen - ones) ** 2).sum())
        if (chosen >= 0).all() and residual < least:
            best, least = np.zeros(counts.shape[1]), residual
            best[list(subset)] = chosen
    return best


def _varies(ratios: NDArray[np.float64]) -> bool:
    positive = ratios[ratios > 0]
    return bool(len(positive) and positive.max() >= LEAST_VARIATION * positive.min())


def _by_step(of_phases: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over a step's three phases."""
    return of_phases.reshape(-1, 3).sum(axis=1)


def _spread(observed: NDArray[np.float64], fitted: NDArray[np.float64]) -> list[float]:
    """Observed over fitted seconds, with mean 1."""
    ratios = observed / fitted
    return (ratios / ratios.mean()).tolist()


def _rest_of_a_rollout(steps: Sequence[tuple[MeasuredRun, MeasuredStep]]) -> float:
    """Seconds of a step outside of servers and models, over its rollouts."""
    named = ("sync", "generate", "evaluate", "infer", "critic", "policy")
    rest = sum(
        sum(step.seconds.values()) - sum(step.seconds.get(f"time/{n}_s", 0.0) for n in named) for _, step in steps
    )
    return rest / sum(len(step.sequence_tokens) for _, step in steps)
