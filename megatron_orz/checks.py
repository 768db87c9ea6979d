"""What can be wrong with a config and is seen before any model is built: its models, their tokenizers, its data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from megatron_orz.command_line import num_nodes, rank, world_size
from megatron_orz.config import Config, SupervisedConfig
from megatron_orz.data.prompts import check_vocabulary, load_prompts
from megatron_orz.engine.architecture import Architecture, read_architecture
from megatron_orz.engine.budget import check_colocated
from megatron_orz.engine.torch_dist import is_torch_dist
from megatron_orz.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_models(config: Config) -> PreTrainedTokenizerBase:
    """Checks models, layout and tokenizers against each other, and returns the tokenizer. Raises ValueError."""
    of_policy = _check_model(config, config.policy.path)
    if config.fleet.kind != "local" and not config.fleet.urls:
        config.fleet.of_node(num_nodes())
    if config.fleet.colocated and torch.cuda.is_available():
        check_colocated(
            config,
            read_architecture(config.policy.path),
            read_architecture(config.critic.path) if config.critic and config.ppo.uses_critic else None,
            world_size=world_size(),
            gpu_bytes=torch.cuda.get_device_properties(0).total_memory,
        )
    readers = {"critic.path": config.critic.path} if config.critic and config.ppo.uses_critic else {}
    if config.kl.coefficient > 0 and config.kl.reference is not None:
        readers["kl.reference"] = config.kl.reference
    for option, path in readers.items():
        if _check_model(config, path).get_vocab() != of_policy.get_vocab():
            raise ValueError(
                f"{path} has another vocabulary than {config.policy.path}, whose tokens it reads; "
                f"set {option} to a model with the policy's tokenizer"
            )
    return of_policy


def check_architecture(config: Config, architecture: Architecture, path: Path) -> None:
    """Checks one model against the layout and the longest sequence. Raises ValueError."""
    architecture.check_layout(config.parallel)
    if config.fleet.max_model_tokens > architecture.max_position:
        raise ValueError(
            f"fleet.max_model_tokens {config.fleet.max_model_tokens} exceeds the {architecture.max_position} "
            f"positions of {path}; lower it"
        )


def _check_model(config: Config, path: Path) -> PreTrainedTokenizerBase:
    architecture = read_architecture(path)
    check_architecture(config, architecture, path)
    # The servers of the fleet start from the policy's checkpoint, and know this form alone.
    if not any(path.glob("*.safetensors")) and (path == config.policy.path or not is_torch_dist(path)):
        raise ValueError(f"{path} holds no .safetensors file; save the checkpoint as safetensors")
    return load_tokenizer(path, architecture)


def check_supervised(config: SupervisedConfig) -> PreTrainedTokenizerBase:
    """Checks the model of a supervised run and its tokenizer, and returns the tokenizer. Raises ValueError."""
    path, max_tokens = config.model.path, config.data.max_tokens
    architecture = read_architecture(path)
    architecture.check_layout(config.parallel)
    if max_tokens - 1 > architecture.max_position:
        raise ValueError(
            f"data.max_tokens {max_tokens} exceeds the {architecture.max_position} positions of {path}; lower it"
        )
    if not any(path.glob("*.safetensors")) and not is_torch_dist(path):
        raise ValueError(f"{path} holds no weights; save the checkpoint as safetensors, or convert it")
    return load_tokenizer(path, architecture)


def load_tokenizer(path: Path, architecture: Architecture) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises ValueError where there is none, or one of another model."""
    remedy = "copy the tokenizer's files of the same model there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises nothing narrower for a file it cannot read
        raise ValueError(f"{path} holds no tokenizer that transformers can load ({error!r}); {remedy}") from error
    # Where there are no files, transformers makes up a tokenizer without a vocabulary.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{path} holds no tokenizer; {remedy}")
    check_vocabulary(tokenizer, architecture.vocab_size)
    return tokenizer


def read_data(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Prompt], Mapping[str, Sequence[Prompt]]]:
    """Training prompts, and held-out prompts by the name of their file."""
    data = config.data
    load = partial(
        load_prompts,
        tokenizer=tokenizer,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
        problem_column=data.problem_column,
        answer_column=data.answer_column,
    )
    held_out = {}
    for path in config.evaluation.data:
        if path.stem in held_out:
            raise ValueError(
                f"evaluation.data holds two files named {path.stem}, as their metrics would be; rename one"
            )
        held_out[path.stem], _ = load([path], max_prompts=config.evaluation.max_prompts)
    prompts, report = load(data.train, max_prompts=data.max_prompts)
    if rank() == 0:
        print(f"training data: {report}", file=sys.stderr if config.dry_run else sys.stdout, flush=True)
    return prompts, held_out
