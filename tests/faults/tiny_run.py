"""A recipe of a run that takes two seconds, with a model of random weights."""

from __future__ import annotations

from pathlib import Path

from megatron_orz.data.synthetic import build_tokenizer, write_problems
from tests.engine import tiny

NUM_STEPS = 5

_RECIPE = f"""
from pathlib import Path

from megatron_orz import train
from megatron_orz.config import (
    CheckpointConfig, Config, CriticConfig, DataConfig, EvaluationConfig, FleetConfig, ModelConfig, OptimizerConfig,
    PPOConfig, RewardConfig, SamplingConfig,
)

HERE = Path(__file__).parent
RECIPE = Config(
    run_dir=Path("run"),
    policy=ModelConfig(path=HERE / "model", optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4)),
    critic=CriticConfig(path=HERE / "model", optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4)),
    ppo=PPOConfig(num_steps={NUM_STEPS}, num_prompts=3, num_responses=2, num_critic_updates=2),
    sampling=SamplingConfig(max_response_tokens=6, stop=tuple("abcdefghijklmnopqrstuvwxyz0123456789")),
    data=DataConfig(train=(HERE / "train.jsonl",), template="short", max_prompt_tokens=24, max_pack_tokens=96),
    fleet=FleetConfig(kind="local", max_model_tokens=32, kv_cache_gib=0.1, cpu_threads=1),
    evaluation=EvaluationConfig(data=(HERE / "held_out.jsonl",), num_responses=2, interval=2),
    reward=RewardConfig(timeout_s=120.0),
    checkpoint=CheckpointConfig(interval=2, keep=1),
)

if __name__ == "__main__":
    train.main(RECIPE)
"""


def write_recipe(home: Path, *, family: str = "qwen2") -> Path:
    """The recipe, its model and its data, in an empty directory. vLLM needs a family with wider heads: `qwen3`."""
    (home / "recipe.py").write_text(_RECIPE)
    tokenizer = build_tokenizer()
    tiny.save_model(home / "model", family=family, vocab_size=len(tokenizer), num_layers=2)
    tokenizer.save_pretrained(home / "model")
    # Answers that a made-up one may meet; an epoch that is no multiple of a step's prompts.
    write_problems(home / "train.jsonl", ["0+0", "0+1", "1+0", "1+1", "2-1", "2-0", "1-1"])
    write_problems(home / "held_out.jsonl", ["0+2", "2-2"])
    return home / "recipe.py"
