from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2ForCausalLM

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.ranks import Ranks
from megatron_orz.rollout.fleet import open_fleet
from megatron_orz.rollout.local import LocalFleet
from megatron_orz.types import Rollout
from tests.launch import run_ranks
from tests.rollout.conftest import (
    check_endings,
    log_prob_error,
    make_prompts,
    model_config,
    named_weights,
    tiny_model,
)

SAMPLING = SamplingConfig(max_response_tokens=40, stop=("ab", "z", "Q("))
# Both sides compute in float32, in another order and with other batch shapes.
TOLERANCE = 1e-4


def local_fleet(path: Path, sampling: SamplingConfig = SAMPLING, *, max_batch_rollouts: int = 512) -> LocalFleet:
    return LocalFleet(model_config(path), sampling, ranks=Ranks(), max_batch_rollouts=max_batch_rollouts, device="cpu")


def contents(rollouts: list[Rollout]) -> list[tuple[int, list[int], str, int]]:
    return [(r.prompt.prompt_id, r.response_ids, r.finish_reason, r.policy_version) for r in rollouts]


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        SamplingConfig(max_response_tokens=40, temperature=0.7, stop=()),
        SamplingConfig(max_response_tokens=40, temperature=1.3, top_k=20, top_p=0.9, stop=()),
    ],
    ids=["plain", "temperature", "top"],
)
def test_log_probs_are_those_of_the_sampling_distribution(tied_checkpoint: Path, sampling: SamplingConfig) -> None:
    rollouts = local_fleet(tied_checkpoint, sampling).generate(make_prompts(20), num_responses=4, seed=0)
    assert log_prob_error(tiny_model(tied=True, seed=0), rollouts, sampling) < TOLERANCE


def test_responses_end_at_the_first_stop_and_keep_it(tied_checkpoint: Path) -> None:
    rollouts = local_fleet(tied_checkpoint).generate(make_prompts(40), num_responses=20, seed=0)
    assert check_endings(rollouts, SAMPLING) == {"eos", "length", *SAMPLING.stop}


def test_a_vanishing_temperature_gives_the_greedy_answer_of_transformers(tied_checkpoint: Path) -> None:
    greedy = SamplingConfig(max_response_tokens=20, top_k=1, stop=())
    model = Qwen2ForCausalLM.from_pretrained(tied_checkpoint)
    for rollout in local_fleet(tied_checkpoint, greedy).generate(make_prompts(12), num_responses=1, seed=0):
        prompt = torch.tensor([rollout.prompt.token_ids])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
        assert rollout.response_ids == expected[0, len(rollout.prompt.token_ids) :].tolist()
        assert rollout.rollout_log_probs == [0.0] * len(rollout.response_ids)


def test_order_and_contents_depend_on_the_seed_and_not_on_the_batches(tied_checkpoint: Path) -> None:
    prompts = make_prompts(15)
    fleet = local_fleet(tied_checkpoint)
    rollouts = fleet.generate(prompts, num_responses=4, seed=5)
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(4)]
    assert len({tuple(rollout.response_ids) for rollout in rollouts}) == len(rollouts), "siblings repeat each other"

    again = local_fleet(tied_checkpoint, max_batch_rollouts=7).generate(prompts, num_responses=4, seed=5)
    assert contents(again) == contents(rollouts)
    other = fleet.generate(prompts, num_responses=4, seed=6)
    assert not {tuple(r.response_ids) for r in other} & {tuple(r.response_ids) for r in rollouts}


def test_no_prompts_give_no_rollouts(tied_checkpoint: Path) -> None:
    assert local_fleet(tied_checkpoint).generate([], num_responses=4, seed=0) == []


def test_progress_is_reported_once_per_rollout(tied_checkpoint: Path) -> None:
    finished = []
    local_fleet(tied_checkpoint).generate(
        make_prompts(5), num_responses=3, seed=0, on_rollout=lambda: finished.append(None)
    )
    assert len(finished) == 15


def test_siblings_are_told_of_when_the_last_of_them_ends_and_before_all_do(tied_checkpoint: Path) -> None:
    fleet = local_fleet(tied_checkpoint, max_batch_rollouts=6)
    heard: list[list[Rollout]] = []
    finished: list[None] = []

    def on_answer(siblings: Sequence[Rollout]) -> None:
        assert len(heard) > 0 or len(finished) < 15
        heard.append(list(siblings))

    fleet.listen(on_answer)
    rollouts = fleet.generate(make_prompts(5), num_responses=3, seed=0, on_rollout=lambda: finished.append(None))
    heard.sort(key=lambda siblings: siblings[0].prompt.prompt_id)
    assert contents([rollout for siblings in heard for rollout in siblings]) == contents(rollouts)


@pytest.mark.parametrize("tied", [True, False])
def test_update_replaces_every_weight(tied_checkpoint: Path, untied_checkpoint: Path, tied: bool) -> None:
    fleet = local_fleet(tied_checkpoint if tied else untied_checkpoint)
    prompts = make_prompts(6)
    assert {rollout.policy_version for rollout in fleet.generate(prompts, num_responses=2, seed=0)} == {-1}
    for version in (0, 1):
        model = tiny_model(tied=tied, seed=10 + version)
        fleet.update_weights(named_weights(model), version)
        rollouts = fleet.generate(prompts, num_responses=2, seed=0)
        assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE
        assert {rollout.policy_version for rollout in rollouts} == {version}


def test_a_tied_weight_may_come_under_both_names(tied_checkpoint: Path) -> None:
    model = tiny_model(tied=True, seed=3)
    fleet = local_fleet(tied_checkpoint)
    fleet.update_weights(iter(model.state_dict().items()), 0)
    assert log_prob_error(model, fleet.generate(make_prompts(4), num_responses=2, seed=0), SAMPLING) < TOLERANCE


def test_incomplete_or_foreign_weights_are_refused(tied_checkpoint: Path) -> None:
    fleet = local_fleet(tied_checkpoint)
    weights = list(tiny_model(tied=True, seed=3).named_parameters())
    with pytest.raises(ValueError, match=r"1 parameters got no new weight, among them 'model.norm.weight'"):
        fleet.update_weights(((name, weight) for name, weight in weights if name != "model.norm.weight"), 0)
    with pytest.raises(ValueError, match=r"'model.other' is not a parameter of Qwen2ForCausalLM"):
        fleet.update_weights(iter([("model.other", torch.zeros(1))]), 0)
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[3\], the model has \[64\]"):
        fleet.update_weights(iter([("model.norm.weight", torch.zeros(3))]), 0)


def test_diverged_weights_are_an_error(tied_checkpoint: Path) -> None:
    model = tiny_model(tied=True, seed=0)
    model.model.norm.weight.fill_(torch.nan)
    fleet = local_fleet(tied_checkpoint)
    fleet.update_weights(named_weights(model), 0)
    with pytest.raises(RuntimeError, match="its weights have diverged"):
        fleet.generate(make_prompts(3), num_responses=2, seed=0)


def _generate_on_ranks(path: Path, expected: list[tuple[int, list[int], str, int]]) -> None:
    dist.init_process_group("gloo")
    fleet_config = FleetConfig(kind="local", max_batch_rollouts=6)
    with open_fleet(fleet_config, SAMPLING, model_config(path), run_dir=path) as fleet:
        fleet.update_weights(named_weights(tiny_model(tied=True, seed=4)), 0)
        # 5 prompts on 2 ranks: an uneven split.
        assert contents(fleet.generate(make_prompts(5), num_responses=3, seed=1)) == expected
        # One prompt: nothing to do on the second rank.
        assert contents(fleet.generate(make_prompts(1), num_responses=3, seed=1)) == expected[:3]

        # Rank 1 alone gets a foreign weight: no rank goes on.
        weights = list(tiny_model(tied=True, seed=4).named_parameters())
        if dist.get_rank() == 1:
            weights[0] = ("model.other", torch.zeros(64))
        expected_error = (RuntimeError, r"the weight update failed on rank 1: ValueError: weight 'model\.other'")
        if dist.get_rank() == 1:
            expected_error = (ValueError, r"weight 'model\.other'")
        with pytest.raises(expected_error[0], match=expected_error[1]):
            fleet.update_weights(iter(weights), 1)
    dist.destroy_process_group()


def test_two_ranks_give_the_list_of_one(tied_checkpoint: Path) -> None:
    fleet = local_fleet(tied_checkpoint)
    fleet.update_weights(named_weights(tiny_model(tied=True, seed=4)), 0)
    expected = contents(fleet.generate(make_prompts(5), num_responses=3, seed=1))
    run_ranks(2, _generate_on_ranks, tied_checkpoint, expected)
