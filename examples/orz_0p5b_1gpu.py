"""Open-Reasoner-Zero on Qwen2.5-0.5B with one GPU, which the server shares with the trainer.

python examples/orz_0p5b_1gpu.py
python examples/orz_0p5b_1gpu.py --dry-run                  # layout, memory and tokens, without the model
python examples/orz_0p5b_1gpu.py --debug                    # one GPU, few prompts, short responses
"""

from pathlib import Path

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
    ParallelConfig,
    PPOConfig,
    SamplingConfig,
)

MODEL = Path("models/Qwen2.5-0.5B")
PUBLISHED_MODELS = Path(__file__).with_name("models")

RECIPE = Config(
    run_dir=Path("runs/orz-0p5b-1gpu"),
    policy=ModelConfig(
        path=MODEL,
        optimizer=OptimizerConfig(lr=1e-6, warmup_steps=50, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_grad=1.0),
        dtype="bfloat16",
        recompute="none",
    ),
    critic=CriticConfig(
        path=MODEL,
        optimizer=OptimizerConfig(lr=5e-6, warmup_steps=50, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_grad=1.0),
        dtype="bfloat16",
        recompute="none",
        value_head_init="normal",
    ),
    kl=KLConfig(coefficient=0.0, estimator="k3", place="loss", reference=MODEL),
    ppo=PPOConfig(
        num_steps=1000,
        num_prompts=128,
        num_responses=64,
        num_policy_updates=1,
        num_critic_updates=12,
        advantages="gae",
        gamma=1.0,
        gae_lambda=1.0,
        whiten_advantages=True,
        clip_eps=0.2,
        value_clip_eps=0.2,
        loss_mean="token",
    ),
    sampling=SamplingConfig(
        max_response_tokens=8000,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        stop=("User:", "Human:", "Assistant:", "</answer>"),
    ),
    data=DataConfig(
        train=(Path("data/orz_math_57k_collected.json"),),
        template="orz",
        max_prompt_tokens=2048,
        max_pack_tokens=16384,
    ),
    parallel=ParallelConfig(num_ranks=1),
    fleet=FleetConfig(
        kind="vllm",
        num_servers=1,
        gpu_memory_share=0.35,
        max_model_tokens=10048,
        request_timeout_s=1800.0,
    ),
    evaluation=EvaluationConfig(
        data=(
            Path("data/eval_data/math500.json"),
            Path("data/eval_data/aime2024.json"),
            Path("data/eval_data/gpqa_diamond.json"),
        ),
        interval=10,
        num_responses=4,
    ),
    hang_timeout_s=3600.0,
)

if __name__ == "__main__":
    train.main(RECIPE, published_models=PUBLISHED_MODELS)
