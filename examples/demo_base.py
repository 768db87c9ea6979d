"""Trains the demo's base model: a small Qwen2 that answers in the right form, and is right every third time.

    python examples/demo_base.py

Writes a Hugging Face checkpoint (runs/demo-base/final) and the problems (runs/demo-base/*.jsonl); the same seed gives
the same files. `examples/demo.py` runs it when they are missing.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_orz.command_line import parse, plain_errors
from megatron_orz.config import CheckpointConfig, ConversationConfig, ModelConfig, OptimizerConfig, SupervisedConfig
from megatron_orz.data.synthetic import (
    ArithmeticTask,
    build_tokenizer,
    make_problems,
    write_conversations,
    write_problems,
)
from megatron_orz.supervised import train_supervised


@dataclass(frozen=True, kw_only=True)
class DemoBase:
    """Size and training of the base model."""

    output: Path = Path("runs/demo-base")
    seed: int = 0
    num_epochs: float = 2.56
    num_conversations: int = 64
    lr: float = 2e-3
    num_train: int = 20000
    num_held_out: int = 128
    task: ArithmeticTask = field(
        default_factory=lambda: ArithmeticTask(num_terms=(3, 4), step_error=0.28, format_error=0.04)
    )

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_held_out) < 1:
            raise ValueError(f"num_train {self.num_train} and num_held_out {self.num_held_out} must be at least 1")


def main(base: DemoBase) -> None:
    """Trains and writes the base model."""
    config = SupervisedConfig(
        run_dir=base.output / "training",
        model=ModelConfig(path=base.output / "untrained", optimizer=OptimizerConfig(lr=base.lr, warmup_steps=50)),
        data=ConversationConfig(
            train=(base.output / "conversations.jsonl",), template="short", max_tokens=256, max_pack_tokens=4096
        ),
        num_epochs=base.num_epochs,
        num_conversations=base.num_conversations,
        checkpoint=CheckpointConfig(interval=0),
        seed=base.seed,
        fresh=True,
    )
    torch.manual_seed(base.seed)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=576,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    train, held_out = make_problems(base.task, num_train=base.num_train, num_held_out=base.num_held_out, seed=base.seed)
    try:
        model.save_pretrained(config.model.path)
        tokenizer.save_pretrained(config.model.path)
        write_problems(base.output / "train.jsonl", train)
        write_problems(base.output / "held_out.jsonl", held_out)
        write_conversations(base.output / "conversations.jsonl", train, base.task, seed=base.seed)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"cannot write to {base.output}: {error}; free some space or change --output") from error
    print(f"training a base model of {model.num_parameters() / 1e6:.1f} M parameters", flush=True)
    train_supervised(config)
    shutil.rmtree(base.output / "final", ignore_errors=True)
    (config.run_dir / "final").rename(base.output / "final")


if __name__ == "__main__":
    with plain_errors():
        main(parse(DemoBase()))
