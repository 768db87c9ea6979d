"""A profile from measured runs: speeds and costs that fit what their steps took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from megatron_orz.simulation.course import critical_tokens
from megatron_orz.simulation.profile import Decoding, Profile, Training
from megatron_orz.simulation.runs import MODEL_PHASES, MeasuredRun, MeasuredStep
from megatron_orz.simulation.servers import generation_seconds
from megatron_orz.timeline import TIMELINE_FILE

LEAST_VARIATION = 1.5
"""A cost per iteration or update is told from one per token where their ratio differs by this factor between steps."""
RUNNING_ON_CPU = 128
"""Responses that each process of a vLLM server on the CPU runs together (its default of max_num_seqs)."""
NOT_TOLD_APART = "all of it per token: runs of one size do not tell that from a cost of every"


def measured_profile(runs: Sequence[MeasuredRun], *, max_running: int | None = None) -> Profile:
    """Speeds and costs that fit the steps of runs best, relative to what each took.

    Generation is  iterations x iteration_s + tokens x response_s, training  tokens x (infer_s + critic_s + policy_s) +
    updates x update_s. Runs of one size do not tell the two terms of either sum apart: all is then put on the tokens.

    max_running: responses that a server decodes together, where the runs' config does not say it.

    Raises ValueError for runs of unlike layouts, or none of which tells how fast servers are.
    """
    first = runs[0]
    for run in runs[1:]:
        if _layout(run) != _layout(first):
            raise ValueError(
                f"{run.run_dir} and {first.run_dir} differ in the size of a replica, a server or a pack; give runs "
                "that do not"
            )
    default = max_running or RUNNING_ON_CPU * first.gpus_per_server
    if first.max_running is not None:
        of_running = "fleet.max_running"
    else:
        of_running = "--max-running" if max_running else "assumed, vLLM's default on the CPU; --max-running for another"
    steps = [(run, step) for run in runs for step in run.steps]
    decoding, server_spread, of_decoding = _fit_decoding(steps, default)
    training, trainer_spread, of_training = _fit_training(steps)
    measured = f"{len(steps)} steps of {', '.join(str(run.run_dir) for run in runs)}"
    prompt_tokens = fmean(
        total - length + 1
        for _, step in steps
        for total, length in zip(step.sequence_tokens, chain.from_iterable(step.groups), strict=True)
    )
    whole = [(run, step) for run, step in steps if not run.num_dropped]
    of_lengths = f"saved generations, {measured}"
    if not whole:
        of_lengths += "; without those of the prompts that over-sampling dropped, which are longer"
    elif len(whole) < len(steps):
        of_lengths += ", but those of over-sampled runs"
    switches = [step.switch_s for run, step in steps if run.setting.colocated]
    of_config = f"config.json of {first.run_dir}"
    return Profile(
        name=" + ".join(run.run_dir.name for run in runs),
        groups=[group for _, step in whole or steps for group in step.groups],
        prompt_tokens=prompt_tokens,
        num_prompts=first.setting.num_prompts,
        num_responses=first.setting.num_responses,
        max_pack_tokens=first.max_pack_tokens,
        decoding=decoding,
        training=training,
        gpus_per_server=first.gpus_per_server,
        gpus_per_replica=first.gpus_per_replica,
        sync_s=fmean(step.sync_s for _, step in steps),
        rollout_s=sum(step.rest_s for _, step in steps) / sum(len(step.sequence_tokens) for _, step in steps),
        switch_s=fmean(switches) / 2 if switches else 0.0,
        trainer_spread=trainer_spread,
        server_spread=server_spread,
        sources={
            "groups": of_lengths,
            "prompt_tokens": f"mean of the saved generations, {measured}",
            "num_prompts": of_config,
            "num_responses": of_config,
            "max_pack_tokens": of_config,
            "decoding": f"{of_decoding}; max_running: {of_running}",
            "training": f"time/infer_s, critic_s, policy_s, {measured}; {of_training}",
            "gpus_per_server": of_config,
            "gpus_per_replica": of_config,
            "sync_s": f"time/sync_s without waiting for responses, mean of {measured}",
            "rollout_s": f"all other time/*_s but evaluate_s over the rollouts, {measured}",
            "switch_s": f"colocation/switch_s of {len(switches)} steps" if switches else "no run is colocated: 0",
            "trainer_spread": f"measured over fitted seconds of training, {measured}",
            "server_spread": f"measured over fitted seconds of generation, {measured}",
        },
    )


def _layout(run: MeasuredRun) -> tuple[int, ...]:
    return run.gpus_per_replica, run.gpus_per_server, run.max_pack_tokens


def _fit_decoding(
    steps: Sequence[tuple[MeasuredRun, MeasuredStep]], default_running: int
) -> tuple[Decoding, list[float], str]:
    """Seconds of an iteration and of a response in it; measured over fitted seconds; what the fit could tell.

    default_running: responses that servers decode together where no config says it.
    """
    timed = [(run, step, step.generate_s) for run, step in steps if step.generate_s is not None]
    if not timed:
        raise ValueError(
            f"{', '.join(sorted({str(run.run_dir) for run, _ in steps}))}: servers answered several steps at once "
            "throughout, so that no step's seconds are its own; add a run of ppo.max_staleness 0 or 1"
        )
    counts = np.array([_unit_seconds(run, step, run.max_running or default_running) for run, step, _ in timed])
    seconds = np.array([generate_s for *_, generate_s in timed])
    told_apart = _varies(counts[:, 1] / counts[:, 0])
    costs = nonnegative_fit(counts, seconds, columns=[0, 1] if told_apart else [1])
    max_running = steps[0][0].max_running or default_running
    decoding = Decoding(iteration_s=float(costs[0]), response_s=float(costs[1]), max_running=max_running)
    remark = "fitted over batches of several sizes" if told_apart else f"{NOT_TOLD_APART} iteration"
    source = f"time/generate_s, or spans of the servers in {TIMELINE_FILE}, of {len(timed)} steps; {remark}"
    return decoding, _spread(seconds, counts @ costs), source


def _unit_seconds(run: MeasuredRun, step: MeasuredStep, max_running: int) -> list[float]:
    """What the step's generation would have taken if an iteration took 1 s, and if a response in one did.

    How long the responses of dropped prompts were is not known, but that one of each was still running at the end: the
    prompts answered last stand in for them, with one response each as long as the longest.
    """
    dropped: list[list[int]] = []
    if run.num_dropped:
        slowest = sorted(step.groups, key=max)[-run.num_dropped :]
        longest = max(slowest[-1])
        dropped = [[*sorted(group)[:-1], longest] for group in slowest]
    units = [Decoding(iteration_s=1.0 - each, response_s=each, max_running=max_running) for each in (0.0, 1.0)]
    return [generation_seconds(u, step.groups, num_servers=run.num_servers, not_needed=dropped) for u in units]


def _fit_training(steps: Sequence[tuple[MeasuredRun, MeasuredStep]]) -> tuple[Training, list[float], str]:
    """As `_fit_decoding`, of (infer_s, critic_s, policy_s, update_s)."""
    rows, seconds, ratios = [], [], []
    for run, step in steps:
        updates = (1, run.num_critic_updates, run.num_policy_updates)
        num_replicas = run.setting.trainer_gpus // run.gpus_per_replica
        tokens = critical_tokens(tuple(step.sequence_tokens), run.max_pack_tokens, num_replicas, updates)
        for column, phase in enumerate(MODEL_PHASES):
            row = [0.0] * 4
            row[column] = tokens[column] * run.gpus_per_replica
            if phase != "infer":
                row[3] = updates[column]
                ratios.append(tokens[column] / max(1, updates[column]))
            rows.append(row)
            seconds.append(step.phases_s[column])
    counts, observed = np.array(rows), np.array(seconds)
    # The sizes of mini-batches of critic and policy differ in any case: those of one model must.
    told_apart = _varies(np.array(ratios[0::2])) or _varies(np.array(ratios[1::2]))
    costs = nonnegative_fit(counts, observed, columns=[0, 1, 2, 3] if told_apart else [0, 1, 2])
    run = steps[0][0]
    training = Training(
        infer_s=float(costs[0]),
        critic_s=float(costs[1]),
        policy_s=float(costs[2]),
        update_s=float(costs[3]),
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
