"""From a `Config` to a run: reads the command line, checks everything, builds the parts and starts the loop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megatron_orz import ppo
from megatron_orz.ahead import OneStepAhead
from megatron_orz.checkpoint import export_hf
from megatron_orz.colocation import ColocatedFleet, ColocatedModel, ColocatedPolicy, Turns
from megatron_orz.command_line import parse, plain_errors, rank, world_size
from megatron_orz.config import Config, ModelConfig, to_json
from megatron_orz.curves import draw_curves
from megatron_orz.data.prompts import PromptStream, check_vocabulary, load_prompts
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.budget import check_colocated
from megatron_orz.engine.torch_dist import is_torch_dist
from megatron_orz.evaluate import evaluate
from megatron_orz.logs import METRICS_FILE, RunLog, read_metrics, set_aside
from megatron_orz.ranks import Ranks
from megatron_orz.resampling import DynamicSampling, Oversampling
from megatron_orz.rewards.grading import MathGrader
from megatron_orz.rewards.math_answer import Verifier
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.timeline import TIMELINE_FILE, Timeline
from megatron_orz.types import Critic, Fleet, Grader, Policy, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(recipe: Config, *, prepare: Callable[[], None] | None = None) -> None:
    """The command line of a recipe: its values are the defaults, every field can be overridden.

    prepare: makes files that the recipe needs and may lack, such as its base model. It is called once the command line
    is known to be sound, and not for a dry run.

    Ends the process with one sentence and exit code 2 for what a user can mend; ORZ_DEBUG=1 shows the traceback.
    """
    with plain_errors():
        config = parse(recipe)
        config.parallel.check_world_size(world_size())
        if prepare is not None and not config.dry_run:
            prepare()
        train(config)


def train(config: Config) -> None:
    """Runs PPO as configured; returns when the last step is done and the final checkpoint is written.

    Raises ValueError for what does not fit the machine, the model or the data, before any model is built.
    """
    disable_progress_bar()  # transformers draws one for every model it loads, on every rank
    config.parallel.check_world_size(world_size())
    tokenizer = check_models(config)
    prompts, held_out = read_data(config, tokenizer)
    if config.dry_run:
        if rank() == 0:
            print(to_json(config), end="")
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
            if isinstance(fleet, ServerFleet):
                log.include(fleet.metrics)
                if config.fleet.colocated:
                    fleet.sleep()
            loss_mean, temperature = config.ppo.loss_mean, config.sampling.temperature
            policy = PolicyEngine(config.policy, mesh, loss_mean=loss_mean, temperature=temperature)
            critic = CriticEngine(config.critic, mesh, loss_mean=loss_mean, seed=config.seed)
        reward = config.reward
        verifier = stack.enter_context(Verifier(timeout_s=reward.timeout_s, num_workers=reward.num_workers))
        grader = MathGrader(verifier, tokenizer, ranks)
        num_responses = config.evaluation.num_responses
        stream = PromptStream(prompts, seed=config.seed)
        timeline = None
        if is_main and config.ppo.max_staleness:
            timeline = stack.enter_context(Timeline(config.run_dir / TIMELINE_FILE))
            log.listen(timeline.on_trainer)
        step_fleet, step_grader = with_options(config, fleet, grader, stream, log, timeline)
        step_policy: Policy = policy
        step_critic: Critic = critic
        if config.fleet.colocated and isinstance(fleet, ServerFleet):
            turns = Turns(fleet, [policy, critic])
            log.include(turns.metrics)
            step_fleet = ColocatedFleet(step_fleet, turns)
            step_policy, step_critic = ColocatedPolicy(policy, turns), ColocatedModel(critic, turns)
        ppo.run(
            config,
            policy=step_policy,
            critic=step_critic,
            fleet=step_fleet,
            grader=step_grader,
            prompts=stream,
            evaluate=partial(evaluate, held_out, fleet, grader, num_responses=num_responses, seed=config.seed, log=log),
            ranks=mesh,
            log=log,
        )
        with ranks.share_fate("writing the final checkpoint"):
            final = config.run_dir / "final"
            export_hf(step_policy.hf_weights(), source=config.policy.path, target=final, is_writer=is_main)
        if is_main:
            summarise(config, log)


def with_options(
    config: Config,
    fleet: Fleet,
    grader: Grader,
    prompts: PromptStream,
    log: RunLog,
    timeline: Timeline | None,
) -> tuple[Fleet, Grader]:
    """The fleet and the grader of the training steps, with the options of `resampling` and `ahead`."""
    step_fleet, step_grader = fleet, grader
    if config.ppo.oversampling and isinstance(fleet, ServerFleet):
        step_fleet = oversampling = Oversampling(fleet, prompts, share=config.ppo.oversampling)
        log.include(oversampling.metrics)
    if config.ppo.max_staleness and isinstance(fleet, ServerFleet):
        last_seed = ppo.rollout_seed(config.seed, config.ppo.num_steps - 1)
        on_span = timeline.on_servers if timeline is not None else None
        step_fleet = ahead = OneStepAhead(fleet, prompts, last_seed=last_seed, on_span=on_span)
        log.include(ahead.metrics)
    if config.ppo.max_resampling_rounds:
        step_grader = dynamic = DynamicSampling(
            grader,
            step_fleet,
            prompts,
            num_responses=config.ppo.num_responses,
            max_rounds=config.ppo.max_resampling_rounds,
            seed=config.seed,
        )
        log.include(dynamic.metrics)
    return step_fleet, step_grader


def check_models(config: Config) -> PreTrainedTokenizerBase:
    """Checks models, layout and tokenizers against each other, and returns the tokenizer. Raises ValueError."""
    of_policy, of_critic = (_check_model(config, model) for model in (config.policy, config.critic))
    if config.fleet.colocated and torch.cuda.is_available():
        check_colocated(
            config,
            read_architecture(config.policy.path),
            read_architecture(config.critic.path),
            world_size=world_size(),
            gpu_bytes=torch.cuda.get_device_properties(0).total_memory,
        )
    if of_policy.get_vocab() != of_critic.get_vocab():
        raise ValueError(
            f"{config.critic.path} has another vocabulary than {config.policy.path}, whose tokens the critic reads; "
            "set critic.path to a model with the policy's tokenizer"
        )
    return of_policy


def _check_model(config: Config, model: ModelConfig) -> PreTrainedTokenizerBase:
    path = model.path
    architecture = read_architecture(path)
    architecture.check_layout(config.parallel)
    if config.fleet.max_model_tokens > architecture.max_position:
        raise ValueError(
            f"fleet.max_model_tokens {config.fleet.max_model_tokens} exceeds the {architecture.max_position} "
            f"positions of {path}; lower it"
        )
    # The servers of the fleet start from the policy's checkpoint, and know this form alone.
    if not any(path.glob("*.safetensors")) and (model is config.policy or not is_torch_dist(path)):
        raise ValueError(f"{path} holds no .safetensors file; save the checkpoint as safetensors")
    remedy = "copy the tokenizer's files of the same model there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
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
    prompts, report = load(data.train)
    if rank() == 0:
        print(f"training data: {report}", file=sys.stderr if config.dry_run else sys.stdout, flush=True)
    return prompts, held_out


def summarise(config: Config, log: RunLog) -> None:
    """Prints the held-out scores of the first and the last policy, and draws the curves."""
    metrics, picture = config.run_dir / METRICS_FILE, config.run_dir / "curves.png"
    if config.evaluation.data:
        rows = read_metrics(metrics)
        log.print_comparison(rows[0], rows[-1])
    try:
        draw_curves(metrics, picture)
    except OSError as error:
        picture.unlink(missing_ok=True)
        raise RuntimeError(
            f"cannot write {picture}: {error.strerror or error}; free some space and run tools/plot.py {config.run_dir}"
        ) from error
    log.console.print(f"metrics, curves.png and the final checkpoint are in {config.run_dir}")
