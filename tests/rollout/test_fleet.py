"""What holds whatever the server does: every rank gets the same answer, or the same error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist

from megatron_orz.ranks import Ranks
from megatron_orz.rollout.fleet import ServerFleet
from megatron_orz.types import NamedWeights, Prompt, Rollout
from tests.launch import run_ranks
from tests.rollout.conftest import make_prompts

NUM_WEIGHTS = 4


class EchoServers:
    """Answers every prompt with itself, and fails at the second weight of version 9."""

    version = -1
    woken = 0.0

    def wake(self, what: str) -> None:
        self.woken = time.monotonic()

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        self.version = version
        for index, _ in enumerate(weights):
            if version == 9 and index == 1:
                raise ConnectionError("the server is gone")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        num_groups: int | None = None,
        on_rollout: Callable[[], None] | None = None,
    ) -> dict[int, list[Rollout]]:
        if seed == 9:
            raise ValueError("no more rollouts")
        answered = range(len(prompts))[-num_groups:] if num_groups else range(0)
        return {
            index: [echo(prompts[index], sibling, self.version) for sibling in range(num_responses)]
            for index in answered
        }


def echo(prompt: Prompt, sibling: int, version: int) -> Rollout:
    ids = prompt.token_ids[sibling:]
    return Rollout(
        prompt=prompt,
        response_ids=ids,
        rollout_log_probs=[-1.5] * len(ids),
        finish_reason="stop",
        policy_version=version,
    )


def _use_fleet() -> None:
    dist.init_process_group("gloo")
    servers = EchoServers() if dist.get_rank() == 0 else None
    fleet = ServerFleet(servers, ranks=Ranks())  # type: ignore[arg-type]
    prompts = make_prompts(3)

    def collective_weights() -> NamedWeights:
        """Like an engine's: each weight is gathered from all ranks."""
        for index in range(NUM_WEIGHTS):
            weight = torch.ones(1)
            dist.all_reduce(weight)
            yield str(index), weight

    fleet.update_weights(collective_weights(), 3)
    rollouts = fleet.generate(prompts, num_responses=2, seed=0)
    expected = [echo(prompt, sibling, 3) for prompt in prompts for sibling in range(2)]
    assert rollouts == expected
    first = fleet.generate_first(prompts, num_groups=2, num_responses=2, seed=0)
    assert first == expected[2:]

    is_main = dist.get_rank() == 0
    message = "no more rollouts" if is_main else "generation failed on rank 0: ValueError: no more rollouts"
    with pytest.raises(ValueError if is_main else RuntimeError, match=message):
        fleet.generate(prompts, num_responses=2, seed=9)

    # Servers take memory when the last rank has given up its own: on one machine, the clock is everybody's.
    given_up = fleet._ranks.gather(0.0 if is_main else time.monotonic() + 0.2)
    if not is_main:
        time.sleep(0.2)
    fleet.wake("kv_cache")
    assert servers is None or servers.woken >= max(given_up)

    message = "the server is gone" if is_main else "the weight update failed on rank 0: ConnectionError"
    with pytest.raises(ConnectionError if is_main else RuntimeError, match=message):
        fleet.update_weights(collective_weights(), 9)
    # All ranks have left the iterator at its end, and work together again.
    assert len(fleet.generate(prompts, num_responses=2, seed=0)) == 6
    dist.destroy_process_group()


def test_every_rank_gets_the_rollouts_or_the_error_of_rank_0() -> None:
    run_ranks(2, _use_fleet)
