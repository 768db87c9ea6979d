"""How far the policies that sampled the rollouts are from the one that is updated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_orz.algorithms.importance import log_ratios
from megatron_orz.types import DataParallel, Experience, ImportanceLevel, Metrics

LEVELS: tuple[ImportanceLevel, ...] = ("token", "sequence")


def importance_metrics(
    experience: Sequence[Experience], ranks: DataParallel, *, cap: float, level: ImportanceLevel
) -> Metrics:
    """Ratios pi_old / pi_rollout of all response tokens, before the update. Collective.

    `ratio` and `ratio_max` are of tokens, `sequence_ratio` and `sequence_ratio_max` of whole responses, each counted by
    its tokens; `kl` estimates KL(pi_rollout || pi_old) as r - 1 - log r, which is never negative; `clip_share` is that
    of the tokens whose weight is truncated to `cap`, 0 where nothing is weighed.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # tokens, their ratios, those of their sequences, KL, truncated tokens
    largest = torch.full((len(LEVELS),), -math.inf, dtype=torch.float64)
    for batch in experience:
        logs = {name: log_ratios(batch, batch.old_log_probs, name)[batch.loss_mask].double() for name in LEVELS}
        ratios = {name: log.exp() for name, log in logs.items()}
        num_tokens = len(logs["token"])
        truncated = (ratios[level] > cap).sum() if cap else torch.zeros(())
        kl = (ratios["token"] - 1 - logs["token"]).sum()
        parts = [torch.tensor(num_tokens), *(ratios[name].sum() for name in LEVELS), kl, truncated]
        sums += torch.stack([part.double() for part in parts])
        if num_tokens:
            largest = torch.maximum(largest, torch.stack([ratios[name].max() for name in LEVELS]))
    gathered = ranks.dp_all_gather(torch.cat([sums, largest]))  # [dp_size, 7]
    num_tokens, *totals = gathered[:, :5].sum(0).tolist()
    token_mean, sequence_mean, kl_mean, clip_share = (total / num_tokens for total in totals)
    token_max, sequence_max = gathered[:, 5:].max(0).values.tolist()
    return {
        "importance/ratio": token_mean,
        "importance/ratio_max": token_max,
        "importance/sequence_ratio": sequence_mean,
        "importance/sequence_ratio_max": sequence_max,
        "importance/kl": kl_mean,
        "importance/clip_share": clip_share,
    }
