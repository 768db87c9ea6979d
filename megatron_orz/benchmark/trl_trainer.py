"""The baseline of a whole step: TRL's GRPO trainer on the task of `countdown.py`, generating with transformers."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import torch

from megatron_orz.benchmark.countdown_work import StepTimes, Work
from megatron_orz.config import OptimizerConfig
from megatron_orz.engine.high_water import peak_bytes
from megatron_orz.rewards.math_answer import Response
from megatron_orz.rewards.verifiers import AnswerVerifier


def run_trl(work: Work, optimizer: OptimizerConfig) -> StepTimes:
    """Trains for `work.num_steps` steps in this process. The reward comes from our verifier, as in our own runs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(work.model, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    config = GRPOConfig(
        output_dir=str(work.folder / "trl"),
        max_steps=work.num_steps,
        per_device_train_batch_size=work.trl_rows,
        gradient_accumulation_steps=work.num_prompts * work.num_responses // work.trl_rows,
        num_generations=work.num_responses,
        max_completion_length=work.max_response_tokens,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_grad,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = [{"prompt": row["question"], "answer": row["answer"]} for row in work.prompts()]
    num_tokens: Counter[int] = Counter()
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    with AnswerVerifier() as verifier:

        def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
            num_tokens[len(ends) - 1] += sum(map(len, completion_ids))
            responses: list[Response] = [
                (tokenizer.decode(ids), "stop" if ids[-1] == tokenizer.eos_token_id else "length", reference)
                for ids, reference in zip(completion_ids, answer, strict=True)
            ]
            return [grade.reward for grade in verifier.grade(["math"] * len(responses), responses)]

        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return StepTimes(
        seconds=[end - start for start, end in itertools.pairwise(ends)],
        num_response_tokens=[num_tokens[step] for step in range(work.num_steps)],
        rewards=rewards,
        peak_bytes=peak_bytes(trainer.model.device),
    )
