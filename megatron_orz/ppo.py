"""Proximal policy optimisation of a language model against a verifier: the loop of every run.

Every rank runs this same loop. Which model, layout, fleet and verifier stand behind its arguments is decided in
`train.py`. Policy version n is the policy after n steps; row n of the metrics tells how version n did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TypeVar

from megatron_orz.algorithms.algorithm import Absent, Algorithm
from megatron_orz.config import Config
from megatron_orz.data.packing import pack, split
from megatron_orz.data.prompts import PromptStream
from megatron_orz.logs import RunLog
from megatron_orz.metrics.experience import experience_metrics
from megatron_orz.metrics.importance import importance_metrics
from megatron_orz.types import (
    Critic,
    DataParallel,
    Experience,
    Fleet,
    Grader,
    Metrics,
    PackedBatch,
    Policy,
    Reference,
    Rollout,
    Trainable,
)

Loss = TypeVar("Loss")


def run(
    config: Config,
    *,
    algorithm: Algorithm,
    policy: Policy,
    critic: Critic,
    reference: Reference,
    fleet: Fleet,
    grader: Grader,
    prompts: PromptStream,
    evaluate: Callable[[], Metrics],
    record_rollouts: Callable[[int, Sequence[Rollout]], Metrics],
    ranks: DataParallel,
    log: RunLog,
    num_done: int = 0,
    on_step_end: Callable[[int], None] = lambda num_done: None,
) -> None:
    """Trains policy and critic until `config.ppo.num_steps` steps are done.

    algorithm: what rewards, advantages and losses are. A critic or reference it does not use says 0 of every token.
    num_done: steps behind policy, critic and prompts. on_step_end: called with the number of steps done, between two.
    evaluate: the held-out scores of the policy the fleet holds. record_rollouts: the metrics of a step's rollouts.
    """
    ppo = config.ppo
    for step in range(num_done, ppo.num_steps + 1):
        start = time.perf_counter()
        with log.span("sync"):
            fleet.update_weights(policy.hf_weights(), version=step)
        scores = scores_if_due(step, config, evaluate, log)
        if step == ppo.num_steps:
            log.record(step, scores)
            return

        # Sample y ~ pi_old(. | x) and score r(x, y) in {0, 1}.
        with log.span("generate"), log.progress("generate", total=ppo.num_prompts * ppo.num_responses) as advance:
            chosen, seed = prompts.take(ppo.num_prompts), rollout_seed(config.seed, step)
            rollouts = fleet.generate(chosen, num_responses=ppo.num_responses, seed=seed, on_rollout=advance)
        with log.span("reward"), log.progress("reward", total=len(rollouts)) as advance:
            rollouts = grader.grade(rollouts, on_grade=advance)
        metrics, num_tokens = record_rollouts(step, rollouts), sum(rollout.num_tokens for rollout in rollouts)

        # log pi_old, V_old and log pi_ref, then advantages A_t and returns R_t, such as by GAE(gamma, lambda).
        num_critic_updates, num_policy_updates = ppo.num_updates(step)
        with log.span("infer"):
            batches = pack_rollouts(rollouts, algorithm.rewards(rollouts), step, config, ranks)
            del rollouts  # every rank holds all of them; packs are its share
            reference.refresh(step)
            sampler = Absent() if algorithm.is_on_policy(num_policy_updates) else policy
            inferred = [model.infer(batches) for model in (sampler, critic, reference)]
            experience, moments = algorithm.estimate(batches, *inferred)
            trained = algorithm.whiten(experience, moments, ranks.dp_all_gather)

        # Regress V on R; maximise the clipped surrogate E[min(rho A, clip(rho) A)].
        metrics |= update("critic", critic, trained, num_critic_updates, algorithm.value_loss, log)
        policy_metrics, experience = update_policy(policy, trained, experience, num_policy_updates, algorithm, log)
        metrics |= policy_metrics | experience_metrics(experience, moments, ranks, has_critic=ppo.uses_critic)
        metrics |= importance_metrics(experience, ranks, cap=ppo.importance_cap, level=ppo.importance_level)
        log.record(step, metrics | scores | speed(num_tokens, start))
        del batches, inferred, experience, trained  # those of the next step need the room
        on_step_end(step + 1)


def scores_if_due(step: int, config: Config, evaluate: Callable[[], Metrics], log: RunLog) -> Metrics:
    """The held-out scores before the first step, at every interval and after the last step; else nothing."""
    if step % config.evaluation.interval and step < config.ppo.num_steps:
        return {}
    with log.span("evaluate"):
        return evaluate()


def pack_rollouts(
    rollouts: Sequence[Rollout], rewards: Sequence[float], step: int, config: Config, ranks: DataParallel
) -> list[PackedBatch]:
    """This rank's share of the rollouts, in at least as many packs as the step has updates."""
    return pack(
        rollouts,
        rewards,
        max_pack_tokens=config.data.max_pack_tokens,
        dp_size=ranks.dp_size,
        dp_rank=ranks.dp_rank,
        min_packs=max(config.ppo.num_updates(step)),
        pad_multiple=ranks.pack_multiple,
        seed=rollout_seed(config.seed, step),
    )


def update(
    name: str, model: Trainable[Loss], experience: Sequence[Experience], num_updates: int, loss: Loss, log: RunLog
) -> Metrics:
    """One optimizer step on each of `num_updates` mini-batches; the means of their metrics."""
    if num_updates == 0:
        return {}
    metrics: list[Metrics] = []
    with log.span(name), log.progress(name, total=num_updates) as advance:
        for minibatch in split(experience, num_updates):
            metrics.append(model.step(minibatch, loss))
            advance()
    return {metric: fmean(step[metric] for step in metrics) for metric in metrics[0]}


def update_policy(
    policy: Policy,
    trained: Sequence[Experience],
    experience: list[Experience],
    num_updates: int,
    algorithm: Algorithm,
    log: RunLog,
) -> tuple[Metrics, list[Experience]]:
    """`update` of the policy. The forward pass of an only update finds log pi_old, if nothing has asked for it before.

    trained: with the advantages of the loss. Returns the metrics, and `experience` with log pi_old.
    """
    if not algorithm.is_on_policy(num_updates):
        return update("policy", policy, trained, num_updates, algorithm.policy_loss, log), experience
    with log.span("policy"), log.progress("policy", total=1) as advance:
        metrics, old_log_probs = policy.step_on_policy(trained, algorithm.policy_loss)
        advance()
    return metrics, [replace(e, old_log_probs=x) for e, x in zip(experience, old_log_probs, strict=True)]


def speed(num_tokens: int, start: float) -> Metrics:
    """Tokens of prompts and responses a second, since `start`."""
    return {"tokens_per_s": num_tokens / (time.perf_counter() - start)}


def rollout_seed(seed: int, step: int) -> int:
    """A seed of its own for each step of each run."""
    return seed * 1_000_003 + step
