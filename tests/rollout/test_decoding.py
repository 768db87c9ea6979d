"""Continuous batching: what is drawn does not depend on who shares the batch, and slots do not stand empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_orz.config import SamplingConfig
from megatron_orz.ranks import Ranks
from megatron_orz.rollout.local import LocalFleet
from megatron_orz.rollout.slots import NextTokens, SlotCache
from megatron_orz.types import Prompt
from tests.rollout.conftest import CHARACTERS, EOS_ID, log_prob_error, make_prompts, model_config, tiny_model

# Past the first room of a slot, 64 tokens, and past the second.
SAMPLING = SamplingConfig(max_response_tokens=200, stop=("ab", "z"))
TOLERANCE = 1e-4


def fleet_of(path: Path, *, max_batch_rollouts: int, sampling: SamplingConfig = SAMPLING) -> LocalFleet:
    return LocalFleet(model_config(path), sampling, ranks=Ranks(), max_batch_rollouts=max_batch_rollouts, device="cpu")


def num_rows_of_steps(fleet: LocalFleet, prompts: list[Prompt], *, num_responses: int) -> tuple[list[int], list[int]]:
    """Rows of each step of a generation, and the lengths of its responses."""
    num_rows: list[int] = []

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(rows := kwargs["rows"], NextTokens):
            num_rows.append(len(rows.slots))

    handle = fleet._model.register_forward_pre_hook(count, with_kwargs=True)
    rollouts = fleet.generate(prompts, num_responses=num_responses, seed=3)
    handle.remove()
    return num_rows, [len(rollout.response_ids) for rollout in rollouts]


def test_responses_that_outgrow_their_slots_are_those_of_one_forward_pass(tied_checkpoint: Path) -> None:
    model = tiny_model(tied=True, seed=0)
    for max_batch_rollouts in (64, 5):
        rollouts = fleet_of(tied_checkpoint, max_batch_rollouts=max_batch_rollouts).generate(
            make_prompts(12), num_responses=4, seed=0
        )
        assert max(len(rollout.response_ids) for rollout in rollouts) > 120
        assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE


def test_slots_are_filled_again_as_responses_end(tied_checkpoint: Path) -> None:
    num_rows, lengths = num_rows_of_steps(
        fleet_of(tied_checkpoint, max_batch_rollouts=8), make_prompts(40), num_responses=4
    )
    assert sum(num_rows) == sum(lengths), "a row that has ended is still computed"
    assert max(num_rows) == 8
    # With the last ones begun, slots run empty; before, an eighth of them at most.
    num_draining = max(lengths)
    assert all(rows == 8 for rows in num_rows[:-num_draining])
    assert len(num_rows) <= -(-sum(lengths) // 8) + num_draining


def test_the_last_ones_begin_as_soon_as_there_is_room_though_they_are_few(tied_checkpoint: Path) -> None:
    """Seventeen responses in sixteen slots: the last begins when two slots are free, an eighth of them."""
    prompts = [replace(prompt, token_ids=prompt.token_ids[:5]) for prompt in make_prompts(17)]
    num_rows, lengths = num_rows_of_steps(fleet_of(tied_checkpoint, max_batch_rollouts=16), prompts, num_responses=1)
    second_end = sorted(lengths[:16])[1]
    assert len(num_rows) == max(*lengths[:16], second_end + lengths[16])


def test_prompts_of_one_token_need_no_prefill(tied_checkpoint: Path) -> None:
    prompts = [Prompt(prompt_id=0, token_ids=[7], answer="", source=""), *make_prompts(2)]
    for chosen in (prompts[:1], prompts):
        rollouts = fleet_of(tied_checkpoint, max_batch_rollouts=16).generate(chosen, num_responses=3, seed=1)
        assert log_prob_error(tiny_model(tied=True, seed=0), rollouts, SAMPLING) < TOLERANCE


def test_layers_with_a_sliding_window_see_no_further(tied_checkpoint: Path, tmp_path: Path) -> None:
    config = Qwen2Config.from_pretrained(tied_checkpoint)
    config.update(
        {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 6}
    )
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tied_checkpoint / name).read_bytes())
    # Prompts of 5 to 13 tokens: the window matters in the prefill, too.
    rollouts = fleet_of(tmp_path, max_batch_rollouts=16).generate(make_prompts(9), num_responses=2, seed=0)
    assert log_prob_error(model, rollouts, SAMPLING) < TOLERANCE


def test_a_cache_that_grows_keeps_what_its_slots_hold() -> None:
    cache = SlotCache(num_slots=4)
    cache.grow(3, torch.tensor([], dtype=torch.int64), num_slots=4)
    assert cache.capacity == 64
    keys, values = torch.randn(2, 2, 3, 5, 8)
    cache.write(1, torch.tensor([3, 0]), slice(5), keys, values)
    cache.grow(65, torch.tensor([0, 3]), num_slots=2)
    assert cache.capacity == 128
    for cached, written in zip(cache.layers[1], (keys, values), strict=True):
        assert cached.shape == (2, 3, 128, 8)
        assert torch.equal(cached[:, :, :5], written[[1, 0]])
        assert not cached[:, :, 5:].any()


def test_the_tests_above_have_endings_of_all_kinds(tied_checkpoint: Path) -> None:
    rollouts = fleet_of(tied_checkpoint, max_batch_rollouts=64).generate(make_prompts(40), num_responses=4, seed=3)
    endings = {"length" if r.finish_reason == "length" else CHARACTERS[r.response_ids[-1]] for r in rollouts}
    assert {"length", CHARACTERS[EOS_ID], "b", "z"} <= endings
