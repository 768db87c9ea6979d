"""A tiny random Qwen2 with a character-level tokenizer, as checkpoint directories and as a model to compare with."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_orz.config import ModelConfig, OptimizerConfig, SamplingConfig
from megatron_orz.rollout import replica
from megatron_orz.types import NamedWeights, Prompt, Rollout

PAD_ID, EOS_ID = 0, 1
CHARACTERS = ("<pad>", "<eos>", "\n", *(character for character in string.printable if character not in "\n\r\t\v\f"))


def tiny_model(*, tied: bool, seed: int) -> Qwen2ForCausalLM:
    """Weights large enough that a random model has opinions, and two seeds disagree."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def character_tokenizer(vocabulary: tuple[str, ...] = CHARACTERS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def model_config(path: Path) -> ModelConfig:
    return ModelConfig(path=path, optimizer=OptimizerConfig(lr=1e-4))


def named_weights(model: Qwen2ForCausalLM) -> NamedWeights:
    """As an engine would hand them over: a tied weight comes once."""
    return iter(list(model.named_parameters()))


def make_prompts(num_prompts: int) -> list[Prompt]:
    """Prompts of many lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(
            prompt_id=index,
            token_ids=torch.randint(2, len(CHARACTERS), (5 + index % 9,), generator=generator).tolist(),
            answer="",
            source="test",
        )
        for index in range(num_prompts)
    ]


def warped_log_probs(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The sampling distribution by transformers' own definition."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k != -1:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers(None, logits).log_softmax(-1)


def log_prob_error(model: PreTrainedModel, rollouts: list[Rollout], sampling: SamplingConfig) -> float:
    """Largest difference of the rollouts' log-probabilities from those of a forward pass over the same ids."""
    worst = 0.0
    for rollout in rollouts:
        assert len(rollout.response_ids) == len(rollout.rollout_log_probs)
        logits = model(torch.tensor([rollout.prompt.token_ids + rollout.response_ids])).logits[0]
        log_probs = warped_log_probs(logits[len(rollout.prompt.token_ids) - 1 : -1], sampling)
        expected = log_probs.gather(-1, torch.tensor(rollout.response_ids)[:, None]).squeeze(-1)
        worst = max(worst, (expected - torch.tensor(rollout.rollout_log_probs)).abs().max().item())
    return worst


def check_endings(rollouts: list[Rollout], sampling: SamplingConfig) -> set[str]:
    """Every response ends at its first end token or stop string, which stays in it, or at the limit.

    Returns the kinds of endings seen: "eos", "length", or the stop string.
    """
    seen = set()
    for rollout in rollouts:
        ids = rollout.response_ids
        text = "".join(CHARACTERS[token] for token in ids)
        before = "".join(CHARACTERS[token] for token in ids[:-1])
        assert EOS_ID not in ids[:-1]
        assert not any(stop in before for stop in sampling.stop)
        ending = next((stop for stop in sampling.stop if text.endswith(stop)), None)
        if ids[-1] == EOS_ID:
            ending = "eos"
        if ending is None:
            assert len(ids) == sampling.max_response_tokens
            ending = "length"
        assert rollout.finish_reason == ("length" if ending == "length" else "stop")
        seen.add(ending)
    return seen


def write_checkpoint(path: Path, *, tied: bool) -> Path:
    tiny_model(tied=tied, seed=0).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two threads on a busy machine are many times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture
def impatient_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are watched, and started anew, within fractions of a second."""
    monkeypatch.setattr(replica, "_RESTART_DELAYS_S", (0.0, 0.1, 0.2))
    monkeypatch.setattr(replica, "_HEARTBEAT_S", 0.1)
    monkeypatch.setattr(replica, "_DEATH_WAIT_S", 0.5)
