"""Two real vLLM servers that work a step ahead, one of which is killed amid its requests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_orz.ahead import GenerationAhead
from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.data.prompts import PromptStream
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.types import RepeatableWeights, Rollout
from tests.rollout.conftest import log_prob_error, make_prompts, model_config, tiny_model
from tests.rollout.test_process import wait_for

pytest.importorskip("vllm")

from tests.rollout.test_vllm_fleet import TOLERANCE, processes_of

NUM_STEPS, NUM_PROMPTS, NUM_RESPONSES = 4, 24, 8
SAMPLING = SamplingConfig(max_response_tokens=200, stop=())


def weights(version: int) -> RepeatableWeights:
    return RepeatableWeights(lambda: iter(list(tiny_model(tied=True, seed=20 + version).named_parameters())))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_prompt_of_every_step_is_answered_once_though_a_server_is_killed(
    tied_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = FleetConfig(num_servers=2, max_model_tokens=512, kv_cache_gib=0.25)
    stream, same_stream = (PromptStream(make_prompts(60), seed=0) for _ in range(2))
    trained: list[list[Rollout]] = []
    told: Counter[int] = Counter()
    with open_fleet(config, SAMPLING, model_config(tied_checkpoint), run_dir=tmp_path) as fleet:
        assert isinstance(fleet, ServerFleet)
        assert fleet._servers is not None
        replicas = fleet._servers._replicas
        ahead = GenerationAhead(fleet, stream, max_staleness=1, last_seed=NUM_STEPS - 1)
        for step in range(NUM_STEPS):
            ahead.update_weights(weights(step), step)
            trained.append(
                ahead.generate(
                    stream.take(NUM_PROMPTS),
                    num_responses=NUM_RESPONSES,
                    seed=step,
                    on_rollout=lambda: told.update([step]),  # noqa: B023
                )
            )
            if step == 1:  # while the trainer would train on step 1, step 2 is under way
                wait_for(lambda: all(replica.num_requests >= 2 for replica in replicas))
                processes_of(fleet, 0)[1].kill()
                wait_for(lambda: not replicas[0].is_up)
        metrics = fleet.metrics()
    assert metrics["fleet/restarts"] == 1
    assert metrics["fleet/retried_requests"] >= 2, "the server was killed between its requests"
    assert told == dict.fromkeys(range(NUM_STEPS), NUM_PROMPTS * NUM_RESPONSES)
    for step, rollouts in enumerate(trained):
        assert [rollout.prompt for rollout in rollouts] == [
            prompt for prompt in same_stream.take(NUM_PROMPTS) for _ in range(NUM_RESPONSES)
        ]
        assert {rollout.policy_version for rollout in rollouts} == {max(0, step - 1)}
        assert log_prob_error(tiny_model(tied=True, seed=20 + max(0, step - 1)), rollouts, SAMPLING) < TOLERANCE
    responses = [tuple(rollout.response_ids) for rollouts in trained for rollout in rollouts]
    long = [response for response in responses if len(response) >= 10]  # short ones are alike by chance
    assert len(long) > len(responses) / 2
    assert len(set(long)) == len(long), "a response was counted twice"
