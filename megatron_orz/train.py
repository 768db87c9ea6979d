"""From a `Config` to a run: reads the command line, checks everything, builds the parts and starts the loop."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import tyro
from transformers import AutoTokenizer

from megatron_orz import ppo
from megatron_orz.checkpoint import export_hf
from megatron_orz.config import Config, to_json
from megatron_orz.curves import draw_curves
from megatron_orz.data.prompts import PromptStream, check_vocabulary, load_prompts
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.evaluate import evaluate
from megatron_orz.logs import METRICS_FILE, RunLog, read_metrics, set_aside
from megatron_orz.ranks import Ranks
from megatron_orz.rewards.grading import MathGrader
from megatron_orz.rewards.math_answer import Verifier
from megatron_orz.rollout.fleet import open_fleet
from megatron_orz.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(recipe: Config) -> None:
    """The command line of a recipe: its values are the defaults, every field can be overridden.

    Ends the process with one sentence and exit code 2 for what a user can mend; ORZ_DEBUG=1 shows the traceback.
    """
    try:
        train(tyro.cli(Config, default=recipe))
    except (ValueError, RuntimeError) as error:
        if os.environ.get("ORZ_DEBUG"):
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    # What is wrong with the config is wrong on every rank; what breaks later may be wrong on one.
    if rank == 0 or not isinstance(error, ValueError):
        where = f" on rank {rank}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def train(config: Config) -> None:
    """Runs PPO as configured; returns when the last step is done and the final checkpoint is written.

    Raises ValueError for what does not fit the machine, the model or the data, before any model is built.
    """
    config.parallel.check_world_size(int(os.environ.get("WORLD_SIZE", 1)))
    tokenizer = check_models(config)
    prompts, held_out = read_data(config, tokenizer)
    if config.dry_run:
        return

    # Importing megatron-core takes seconds: what can fail has failed by now.
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(open_mesh(config.parallel, seed=config.seed))
        ranks = stack.enter_context(contextlib.closing(Ranks()))
        is_main = mesh.rank == 0
        with ranks.share_fate("preparing the run directory"):
            if is_main and (old_run := set_aside(config.run_dir)):
                print(f"the run that was in {config.run_dir} is now in {old_run}", flush=True)
            log = stack.enter_context(RunLog(config.run_dir, num_steps=config.ppo.num_steps, is_main=is_main))
            log.write_config(config)
        with log.console.status("starting the fleet and building the models"):
            fleet = stack.enter_context(
                open_fleet(config.fleet, config.sampling, config.policy, run_dir=config.run_dir)
            )
            loss_mean, temperature = config.ppo.loss_mean, config.sampling.temperature
            policy = PolicyEngine(config.policy, mesh, loss_mean=loss_mean, temperature=temperature)
            critic = CriticEngine(config.critic, mesh, loss_mean=loss_mean, seed=config.seed)
        reward = config.reward
        verifier = stack.enter_context(Verifier(timeout_s=reward.timeout_s, num_workers=reward.num_workers))
        grader = MathGrader(verifier, tokenizer, ranks)
        num_responses = config.evaluation.num_responses
        ppo.run(
            config,
            policy=policy,
            critic=critic,
            fleet=fleet,
            grader=grader,
            prompts=PromptStream(prompts, seed=config.seed),
            evaluate=partial(evaluate, held_out, fleet, grader, num_responses=num_responses, seed=config.seed, log=log),
            ranks=mesh,
            log=log,
        )
        with ranks.share_fate("writing the final checkpoint"):
            final = config.run_dir / "final"
            export_hf(policy.hf_weights(), source=config.policy.path, target=final, is_writer=is_main)
        if is_main:
            summarise(config, log)


def check_models(config: Config) -> PreTrainedTokenizerBase:
    """Checks models, layout and tokenizer against each other, and returns the tokenizer. Raises ValueError."""
    for model in (config.policy, config.critic):
        architecture = read_architecture(model.path)
        architecture.check_layout(config.parallel)
        if config.fleet.max_model_tokens > architecture.max_position:
            raise ValueError(
                f"fleet.max_model_tokens {config.fleet.max_model_tokens} exceeds the {architecture.max_position} "
                f"positions of {model.path}; lower it"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{model.path} holds no tokenizer that transformers can load ({error}); copy the tokenizer's files "
                "of the same model there"
            ) from error
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
    prompts, report = load(data.train)
    if int(os.environ.get("RANK", 0)) == 0:
        print(to_json(config) if config.dry_run else "", end="")
        print(f"training data: {report}", flush=True)
    held_out = {
        path.stem: load([path], max_prompts=config.evaluation.max_prompts)[0] for path in config.evaluation.data
    }
    return prompts, held_out


def summarise(config: Config, log: RunLog) -> None:
    """Draws the curves and prints the held-out scores of the first and the last policy."""
    rows = read_metrics(config.run_dir / METRICS_FILE)
    draw_curves(config.run_dir / METRICS_FILE, config.run_dir / "curves.png")
    if config.evaluation.data:
        log.print_comparison(rows[0], rows[-1])
    log.console.print(f"metrics, curves.png and the final checkpoint are in {config.run_dir}")
