"""Small random packs for the tests beside this file."""

import torch

from megatron_orz.types import Experience, PackedBatch


def random_batch(lengths: list[tuple[int, int]], seed: int = 0) -> PackedBatch:
    """A pack of (prompt positions, response positions) sequences with a random reward at each response's end."""
    generator = torch.Generator().manual_seed(seed)
    totals = [prompt + response for prompt, response in lengths]
    cu_seqlens = torch.tensor([0, *totals], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    loss_mask = torch.cat([torch.arange(prompt + response) >= prompt for prompt, response in lengths])
    rewards = torch.zeros(sum(totals))
    rewards[[int(end) - 1 for end, (_, n) in zip(cu_seqlens[1:], lengths, strict=True) if n > 0]] = 1.0
    rewards *= torch.rand(sum(totals), generator=generator)
    return PackedBatch(
        tokens=torch.zeros(sum(totals), dtype=torch.int64),
        targets=torch.zeros(sum(totals), dtype=torch.int64),
        position_ids=torch.cat([torch.arange(total) for total in totals]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(totals),
        loss_mask=loss_mask,
        rewards=rewards,
        rollout_log_probs=torch.zeros(sum(totals)),
    )


def random_experience(lengths: list[tuple[int, int]], seed: int = 0) -> Experience:
    generator = torch.Generator().manual_seed(seed + 1)
    batch = random_batch(lengths, seed)
    num_tokens = len(batch.tokens)
    return Experience.from_batch(
        batch,
        old_log_probs=-torch.rand(num_tokens, generator=generator),
        old_values=torch.randn(num_tokens, generator=generator),
        advantages=torch.randn(num_tokens, generator=generator),
        returns=torch.randn(num_tokens, generator=generator),
    )
