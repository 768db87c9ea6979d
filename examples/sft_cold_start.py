"""A cold start: the demo's base model learns from a teacher's solutions before PPO trains it.

    python examples/demo_base.py                                     # the base model, once
    python examples/sft_cold_start.py                                # less than a minute on two cores
    torchrun --nproc-per-node 2 examples/sft_cold_start.py           # or with --parallel.tp 2, --parallel.pp 2
    python examples/demo.py --run-dir runs/demo-after-cold-start \\
        --policy.path runs/demo-cold-start/final --critic.path runs/demo-cold-start/final

The teacher works out the demo's training problems without a slip. Its conversations are written on the first run;
`--data.train` takes any other JSONL file of conversations. The result is in runs/demo-cold-start.
"""

import json
from pathlib import Path

from filelock import FileLock

from megatron_orz import supervised
from megatron_orz.config import CheckpointConfig, ConversationConfig, ModelConfig, OptimizerConfig, SupervisedConfig
from megatron_orz.data.synthetic import ArithmeticTask, write_conversations

BASE = Path("runs/demo-base")
PLACE = Path("runs/demo-cold-start-data")
NUM_CONVERSATIONS = 512

RECIPE = SupervisedConfig(
    run_dir=Path("runs/demo-cold-start"),
    model=ModelConfig(
        path=BASE / "final", optimizer=OptimizerConfig(lr=5e-4, warmup_steps=2, decay="cosine", min_lr=5e-5)
    ),
    data=ConversationConfig(
        train=(PLACE / "train.jsonl",),
        held_out=(PLACE / "held_out.jsonl",),
        template="short",
        max_tokens=128,
        max_pack_tokens=8192,
    ),
    num_epochs=2.0,
    num_conversations=64,
    held_out_interval=2,
    checkpoint=CheckpointConfig(interval=4),
)


def ensure_conversations() -> None:
    """The teacher's solutions of the demo's problems, once, whichever rank comes first."""
    if not (BASE / "final").exists():
        raise ValueError(f"{BASE / 'final'} is not there; run python examples/demo_base.py first")
    PLACE.mkdir(parents=True, exist_ok=True)
    teacher = ArithmeticTask(step_error=0.0, format_error=0.0)
    with FileLock(PLACE / ".lock", timeout=600):
        for name, limit in (("train", NUM_CONVERSATIONS), ("held_out", None)):
            if not (target := PLACE / f"{name}.jsonl").exists():
                with (BASE / f"{name}.jsonl").open(encoding="utf-8") as lines:
                    problems = [json.loads(line)["question"] for line in lines][:limit]
                write_conversations(target, problems, teacher, seed=0)


if __name__ == "__main__":
    supervised.main(RECIPE, prepare=ensure_conversations)
