"""Proximal policy optimisation of a language model against a verifier: the loop of every run.

Every rank runs this same loop. Which model, layout, fleet and verifier stand behind its arguments is decided in
`train.py`. Policy version n is the policy after n steps; row n of the metrics tells how version n did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, pstdev
from typing import TypeVar

import torch

from megatron_orz.algorithms.advantages import estimate, explained_variance, whiten_advantages
from megatron_orz.algorithms.losses import ClippedValueLoss, policy_loss
from megatron_orz.config import Config
from megatron_orz.data.packing import pack, split
from megatron_orz.data.prompts import PromptStream
from megatron_orz.logs import RunLog
from megatron_orz.types import (
    Critic,
    DataParallel,
    Experience,
    Fleet,
    Grader,
    Metrics,
    PackedBatch,
    Policy,
    Rollout,
    Trainable,
)

Loss = TypeVar("Loss")


def run(
    config: Config,
    *,
    policy: Policy,
    critic: Critic,
    fleet: Fleet,
    grader: Grader,
    prompts: PromptStream,
    evaluate: Callable[[], Metrics],
    ranks: DataParallel,
    log: RunLog,
) -> None:
    """Trains policy and critic for `config.ppo.num_steps` steps.

    evaluate: the held-out scores of the policy the fleet holds.
    """
    ppo, interval = config.ppo, config.evaluation.interval
    surrogate = partial(policy_loss, clip_eps=ppo.clip_eps, importance_cap=ppo.importance_cap)
    squared_error = ClippedValueLoss(ppo.value_clip_eps)
    for step in range(ppo.num_steps + 1):
        start = time.perf_counter()
        with log.span("sync"):
            fleet.update_weights(policy.hf_weights(), version=step)
        is_last = step == ppo.num_steps
        scores: Metrics = {}
        if step % interval == 0 or is_last:
            with log.span("evaluate"):
                scores = evaluate()
        if is_last:
            log.record(step, scores)
            return

        # Sample y ~ pi_old(. | x) and score r(x, y) in {0, 1}.
        num_rollouts = ppo.num_prompts * ppo.num_responses
        with log.span("generate"), log.progress("generate", total=num_rollouts) as advance:
            chosen, seed = prompts.take(ppo.num_prompts), rollout_seed(config.seed, step)
            rollouts = fleet.generate(chosen, num_responses=ppo.num_responses, seed=seed, on_rollout=advance)
        with log.span("reward"), log.progress("reward", total=num_rollouts) as advance:
            rollouts = grader.grade(rollouts, on_grade=advance)

        # log pi_old and V_old, then advantages A_t and returns R_t by GAE(gamma, lambda).
        with log.span("infer"):
            batches = pack(
                rollouts,
                max_pack_tokens=config.data.max_pack_tokens,
                dp_size=ranks.dp_size,
                dp_rank=ranks.dp_rank,
                min_packs=max(ppo.num_policy_updates, ppo.num_critic_updates),
                pad_multiple=ranks.pack_multiple,
                seed=seed,
            )
            old_log_probs, old_values = policy.infer(batches), critic.infer(batches)
            experience, moments = estimate(
                batches, old_log_probs, old_values, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda
            )
            metrics = rollout_metrics(rollouts) | experience_metrics(experience, ranks)
            if ppo.whiten_advantages:
                experience = whiten_advantages(experience, moments, ranks.dp_all_gather)

        # Regress V on R; maximise the clipped surrogate E[min(rho A, clip(rho) A)].
        metrics |= update("critic", critic, split(experience, ppo.num_critic_updates), squared_error, log)
        metrics |= update("policy", policy, split(experience, ppo.num_policy_updates), surrogate, log)
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        log.record(step, metrics | scores | {"tokens_per_s": num_tokens / (time.perf_counter() - start)})


def update(
    name: str, model: Trainable[Loss], minibatches: Sequence[Sequence[Experience]], loss: Loss, log: RunLog
) -> Metrics:
    """One optimizer step on each mini-batch; the means of their metrics."""
    metrics: list[Metrics] = []
    with log.span(name), log.progress(name, total=len(minibatches)) as advance:
        for minibatch in minibatches:
            metrics.append(model.step(minibatch, loss))
            advance()
    return {metric: fmean(step[metric] for step in metrics) for metric in metrics[0]}


def rollout_seed(seed: int, step: int) -> int:
    """A seed of its own for each step of each run."""
    return seed * 1_000_003 + step


def rollout_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Rewards, lengths and endings of a step's rollouts, all of which every rank knows."""
    grades = [rollout.grade for rollout in rollouts if rollout.grade is not None]
    rewards = [grade.reward for grade in grades]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/timed_out": float(sum(grade.timed_out for grade in grades)),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/format_share": fmean(grade.is_formatted for grade in grades),
        "response/truncated_share": fmean(rollout.finish_reason != "stop" for rollout in rollouts),
    }


def experience_metrics(experience: Sequence[Experience], ranks: DataParallel) -> Metrics:
    """How far the servers' log-probabilities are from the trainer's own, and how good the critic is."""
    differences = torch.cat([_mismatch(e, e.old_log_probs) for e in experience])
    count = torch.tensor(float(differences.numel()))
    largest = differences.max() if differences.numel() else torch.zeros(())
    parts = ranks.dp_all_gather(torch.stack([count, differences.sum(), largest]))
    return {
        "log_prob_mismatch/mean": float(parts[:, 1].sum() / parts[:, 0].sum()),
        "log_prob_mismatch/max": float(parts[:, 2].max()),
        "critic/explained_variance": explained_variance(experience, ranks.dp_all_gather),
    }


def _mismatch(batch: PackedBatch, log_probs: torch.Tensor) -> torch.Tensor:
    """|log pi_rollout - log pi_old| of the response tokens."""
    return (batch.rollout_log_probs - log_probs)[batch.loss_mask].abs()
