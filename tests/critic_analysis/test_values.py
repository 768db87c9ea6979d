"""Values against a critic that reads one state at a time, advantages against their sums written out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, Qwen2Config, Qwen2ForCausalLM

from megatron_orz.critic_analysis.values import load_critic, value_responses
from megatron_orz.generations import Generation
from tests.critic_analysis.critics import generation, save_critic

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("critic")
    save_critic(path)
    return path


def generations() -> list[Generation]:
    draw = random.Random(1)
    lengths = [(3, 9), (1, 1), (6, 2), (2, 30), (4, 5)]
    return [
        generation(
            number,
            [draw.randrange(20) for _ in range(num_response)],
            prompt_ids=[draw.randrange(20) for _ in range(num_prompt)],
            reward=float(number % 2),
        )
        for number, (num_prompt, num_response) in enumerate(lengths)
    ]


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 1000])
def test_a_value_is_that_of_the_state_before_its_token(path: Path, max_batch_tokens: int) -> None:
    critic, _ = load_critic(path, device="cpu")
    alone = AutoModelForTokenClassification.from_pretrained(path).eval()
    done = []
    responses = value_responses(
        critic,
        generations(),
        gamma=0.9,
        gae_lambda=0.8,
        min_repeat_tokens=2,
        max_batch_tokens=max_batch_tokens,
        on_response=lambda: done.append(None),
    )
    assert [response.generation for response in responses] == generations()
    assert len(done) == len(responses)
    for response in responses:
        g = response.generation
        values = []
        for t in range(len(g.response_ids)):
            with torch.no_grad():
                state = torch.tensor([[*g.prompt_ids, *g.response_ids[:t]]])
                values.append(float(alone(state).logits[0, -1, 0]))
        assert response.values.tolist() == pytest.approx(values, abs=1e-5)
        deltas = [0.9 * after - value for value, after in zip(values, [*values[1:], 0.0], strict=True)]
        deltas[-1] += g.reward
        expected = [sum(0.72 ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]
        assert response.advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_repeated_tokens_are_marked_and_empty_responses_left_out(path: Path) -> None:
    critic, _ = load_critic(path, device="cpu")
    given = [
        generation(0, [], prompt_ids=[1]),
        generation(1, [5, 6, 7, 1, 5, 6, 7, 2], prompt_ids=[5, 6, 7]),
    ]
    options = {"gamma": 1.0, "gae_lambda": 1.0, "max_batch_tokens": 100}
    (response,) = value_responses(critic, given, min_repeat_tokens=3, **options)
    assert response.is_repeated.tolist() == [False] * 4 + [True] * 3 + [False]
    assert value_responses(critic, given[:1], min_repeat_tokens=3, **options) == []


def test_tokens_of_another_vocabulary_are_refused(path: Path) -> None:
    critic, _ = load_critic(path, device="cpu")
    with pytest.raises(ValueError, match=r"hold the token 99999, but the critic knows \d+; give a critic with the tok"):
        value_responses(
            critic,
            [generation(0, [1, 99_999], prompt_ids=[1])],
            gamma=1.0,
            gae_lambda=1.0,
            min_repeat_tokens=3,
            max_batch_tokens=100,
        )


def test_a_policy_is_not_given_a_random_value_head(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no critic: its config.json names Qwen2ForCausalLM .* final-critic/"):
        load_critic(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"holds no config.json; give a critic's Hugging Face checkpoint"):
        load_critic(tmp_path / "none", device="cpu")
