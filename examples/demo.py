"""PPO end to end on a laptop's CPU: a tiny base model learns to stop making arithmetic slips.

    python examples/demo.py                                              # about ten minutes on two cores
    python examples/demo.py --fleet.kind local                           # without vLLM
    torchrun --nproc-per-node 2 examples/demo.py --parallel.tp 2         # or --parallel.pp 2, or data parallel

The base model is trained on the first run (`examples/demo_base.py`). The result is in runs/demo.
"""

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_orz import train
from megatron_orz.config import (
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)

BASE = Path("runs/demo-base")
BASE_TIMEOUT_S = 1800

RECIPE = Config(
    run_dir=Path("runs/demo"),
    policy=ModelConfig(path=BASE / "final", optimizer=OptimizerConfig(lr=5e-4, warmup_steps=5)),
    critic=CriticConfig(path=BASE / "final", optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5)),
    ppo=PPOConfig(num_steps=40, num_prompts=64, num_responses=8, num_critic_updates=4),
    sampling=SamplingConfig(max_response_tokens=64),
    data=DataConfig(train=(BASE / "train.jsonl",), template="short", max_prompt_tokens=64, max_pack_tokens=8192),
    fleet=FleetConfig(max_model_tokens=128, kv_cache_gib=0.25, cpu_threads=1),
    evaluation=EvaluationConfig(data=(BASE / "held_out.jsonl",), interval=10, num_responses=4),
)


def ensure_base() -> None:
    """Trains the base model in a process of its own, once, whichever rank comes first."""
    BASE.mkdir(parents=True, exist_ok=True)
    of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in of_torchrun}
    try:
        with FileLock(BASE / ".lock", timeout=BASE_TIMEOUT_S):
            if not (BASE / "final").exists():
                builder = Path(__file__).with_name("demo_base.py")
                subprocess.run([sys.executable, str(builder)], check=True, env=environment, timeout=BASE_TIMEOUT_S)
    except (subprocess.SubprocessError, Timeout) as error:
        raise RuntimeError(
            f"the base model could not be trained ({error}); run python examples/demo_base.py"
        ) from error


if __name__ == "__main__":
    train.main(RECIPE, prepare=ensure_base)
