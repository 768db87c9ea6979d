"""The whole recipe on a model of 14 M random weights and little sums: every part at work within minutes on a CPU.

    python examples/orz_14m_debug.py --debug                                   # two steps, a few minutes
    torchrun --nproc-per-node 2 examples/orz_14m_debug.py --debug --parallel.tp 2
    python examples/orz_7b.py --debug --policy.path runs/orz-14m-debug/model \\
        --critic.path runs/orz-14m-debug/model --data.train runs/orz-14m-debug/train.jsonl --evaluation.data

It learns nothing: random weights never answer rightly. The model, made on the first run, also stands in for a large one
when another recipe is tried with --debug. Runs are in runs/orz-14m-debug*.
"""

import os
from pathlib import Path

from filelock import FileLock

from megatron_orz import train
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)

PLACE = Path("runs/orz-14m-debug")
MODEL = PLACE / "model"

RECIPE = Config(
    run_dir=PLACE / "run",
    policy=ModelConfig(path=MODEL, optimizer=OptimizerConfig(lr=1e-6, warmup_steps=50)),
    critic=CriticConfig(path=MODEL, optimizer=OptimizerConfig(lr=5e-6, warmup_steps=50)),
    kl=KLConfig(coefficient=0.0, estimator="k3", place="loss", reference=MODEL),
    ppo=PPOConfig(
        num_steps=10,
        num_prompts=16,
        num_responses=8,
        num_policy_updates=1,
        num_critic_updates=12,
        gamma=1.0,
        gae_lambda=1.0,
        whiten_advantages=True,
        clip_eps=0.2,
        value_clip_eps=0.2,
        loss_mean="token",
    ),
    sampling=SamplingConfig(max_response_tokens=128),
    data=DataConfig(train=(PLACE / "train.jsonl",), template="orz", max_prompt_tokens=1024, max_pack_tokens=8192),
    fleet=FleetConfig(kind="local", max_model_tokens=2048),
    evaluation=EvaluationConfig(data=(PLACE / "held_out.jsonl",), interval=5, num_responses=1),
)


def ensure_model() -> None:
    """Draws the model and writes the problems, once, whichever rank comes first."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with FileLock(PLACE / ".lock", timeout=600):
        if not MODEL.exists():
            make_model()


def make_model() -> None:
    """A Qwen2 of 14 M weights with the demo's tokenizer, and sums of three or four terms."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_orz.checkpoint.hf_export import atomic_directory
    from megatron_orz.data.synthetic import ArithmeticTask, build_tokenizer, make_problems, write_problems

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=9,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=16384,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    problems, held_out = make_problems(ArithmeticTask(num_terms=(3, 4)), num_train=2000, num_held_out=16, seed=0)
    write_problems(PLACE / "train.jsonl", problems)
    write_problems(PLACE / "held_out.jsonl", held_out)
    with atomic_directory(MODEL) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    print(f"{MODEL}: {model.num_parameters() / 1e6:.1f} M random weights, made by process {os.getpid()}", flush=True)


if __name__ == "__main__":
    train.main(RECIPE, prepare=ensure_model)
