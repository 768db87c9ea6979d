"""GRPO in place of PPO on Qwen2.5-7B with 32 GPUs: no critic, rewards relative to a prompt's other responses.

16 GPUs train. Start the 16 servers first, on two other machines (docs/recipe.md says how); `--fleet.urls` names them.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT examples/orz_7b_grpo.py
    python examples/orz_7b_grpo.py --dry-run                  # layout, memory and tokens, without the model
    python examples/orz_7b_grpo.py --debug                    # one GPU, few prompts, short responses
"""

from pathlib import Path

from megatron_orz import train
from megatron_orz.config import (
    Config,
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

MODEL = Path("models/Qwen2.5-7B")
PUBLISHED_MODELS = Path(__file__).with_name("models")

RECIPE = Config(
    run_dir=Path("runs/orz-7b-grpo"),
    policy=ModelConfig(
        path=MODEL,
        optimizer=OptimizerConfig(lr=1e-6, warmup_steps=50, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_grad=1.0),
        dtype="bfloat16",
        recompute="none",
    ),
    critic=None,
    kl=KLConfig(coefficient=0.0, estimator="k3", place="loss", reference=MODEL),
    ppo=PPOConfig(
        num_steps=1000,
        num_prompts=128,
        num_responses=64,
        num_policy_updates=1,
        advantages="group_normalised",
        whiten_advantages=False,
        clip_eps=0.2,
        loss_mean="sequence",
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
    parallel=ParallelConfig(tp=4, sequence_parallel=True, overlap=True, num_ranks=16),
    fleet=FleetConfig(
        urls=tuple(f"http://server-{host}:{8000 + number}" for host in range(2) for number in range(8)),
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
