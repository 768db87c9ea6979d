from __future__ import annotations

import pytest
import torch

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.sampling import StopStrings, draw, prompt_seed, sampling_log_probs, uniforms
from tests.rollout.conftest import character_tokenizer, warped_log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("top_k", [-1, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_sampling_distribution_equals_the_warpers_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    sampling = SamplingConfig(max_response_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(16, 97, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(sampling_log_probs(logits, sampling), warped_log_probs(logits, sampling))


def test_draw_gives_each_token_the_share_its_probability_says() -> None:
    log_probs = torch.tensor([[0.5, 0.0, 0.125, 0.25, 0.125, 0.0]]).log()
    num_draws = 1024  # an even grid over [0, 1): the shares come out exactly
    grid = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    tokens = draw(log_probs.expand(num_draws, -1), grid)
    assert tokens.bincount(minlength=6).tolist() == [512, 0, 128, 256, 128, 0]


def test_draw_never_takes_an_excluded_token_at_the_ends_of_the_interval() -> None:
    log_probs = torch.tensor([[0.0, 0.7, 0.3, 0.0]]).log().expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(log_probs, ends).tolist() == [1, 2]


def test_seeds_and_random_numbers_differ_between_calls_prompts_and_siblings() -> None:
    assert len({prompt_seed(seed, prompt) for seed in range(50) for prompt in range(50)}) == 2500
    first = {
        uniforms(seed, prompt, sibling, 1).item() for seed in range(9) for prompt in range(9) for sibling in range(9)
    }
    assert len(first) == 729
    assert torch.equal(uniforms(3, 1, 4, 10), uniforms(3, 1, 4, 20)[:10])


def test_a_stop_string_is_found_when_the_token_that_completes_it_arrives() -> None:
    vocabulary = ("<pad>", "<eos>", "a", "<", "/", "an", "</an", "swer", ">", "swer>b", "User", ":", " ")
    stop_strings = StopStrings(character_tokenizer(vocabulary), ("</answer>", "User:"))

    def first_stop(*tokens: str) -> int | None:
        ids = [vocabulary.index(token) for token in tokens]
        return next((end for end in range(1, len(ids) + 1) if stop_strings.completed_by(ids[:end])), None)

    assert first_stop("a", "<", "/", "an", "swer", ">", "a") == 6
    assert first_stop("</an", "swer>b", "a") == 2, "the stop string ends inside the last token"
    assert first_stop("a", "User", "a", ":", "User", ":") == 6
    assert first_stop("</an", "a", "swer", ">") is None
    assert first_stop(*["a"] * 100, "</an", "swer", ">") == 103


def test_a_stop_string_may_be_a_special_token() -> None:
    tokenizer = character_tokenizer()
    assert StopStrings(tokenizer, ("<eos>",)).completed_by([10, 11, 1])


def test_no_stop_strings_never_stop() -> None:
    assert not StopStrings(character_tokenizer(), ()).completed_by([5, 6, 7])
