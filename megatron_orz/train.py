"""From a `Config` to a run: reads the command line, checks everything, builds the parts and starts the loop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from megatron_orz import ppo
from megatron_orz.ahead import GenerationAhead
from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.checkpoint.recipe import recipe_of
from megatron_orz.checkpoint.step_end import StepEnd
from megatron_orz.checks import check_models, read_data
from megatron_orz.command_line import parse, plain_errors, rank, world_size
from megatron_orz.compose import compose
from megatron_orz.config import Config
from megatron_orz.curves import draw_curves
from megatron_orz.data.chat_template import chat_template
from megatron_orz.data.prompts import PromptStream
from megatron_orz.debug import scaled_down
from megatron_orz.dry_run import dry_run
from megatron_orz.evaluate import evaluate
from megatron_orz.logs import METRICS_FILE, RunLog, read_metrics
from megatron_orz.metrics.recorder import RolloutRecorder
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.timeline import TIMELINE_FILE, Timeline
from megatron_orz.trackers import check_trackers


def main(recipe: Config, *, prepare: Callable[[], None] | None = None, published_models: Path | None = None) -> None:
    """The command line of a recipe: its values are the defaults, every field can be overridden.

    prepare: makes files that the recipe needs and may lack, such as its base model. It is called once the command line
    is known to be sound, and not for a dry run.
    published_models: a directory with the config.json of models by their names, for a dry run where they are absent.

    Ends the process with one sentence and exit code 2 for what a user can mend; ORZ_DEBUG=1 shows the traceback.
    """
    with plain_errors():
        # The options of a command line change what --debug makes of the recipe.
        config = parse(scaled_down(recipe) if "--debug" in sys.argv[1:] else recipe)
        if config.dry_run:
            dry_run(config, published_models=published_models)
            return
        config.parallel.check_world_size(world_size())
        if prepare is not None:
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
    check_trackers(config.tracking.trackers)

    # Importing megatron-core takes seconds: what can fail has failed by now.
    from megatron_orz.assembly import build_models, in_turns, model_paths, with_options
    from megatron_orz.memory import MemoryMeter
    from megatron_orz.performance import PerformanceMeter, RecordRollouts
    from megatron_orz.start import start_run

    with contextlib.ExitStack() as stack:
        recipe, num_steps = recipe_of(config, prompts), config.ppo.num_steps
        run = start_run(stack, config, recipe, num_steps=num_steps, deterministic=config.deterministic)
        if run is None:
            if rank() == 0:
                print(f"{config.run_dir} holds this run, finished; raise ppo.num_steps or begin anew with --fresh")
            return
        mesh, ranks, log, is_main = run.mesh, run.ranks, run.log, run.is_main
        with log.console.status("starting the fleet and building the models"):
            fleet = stack.enter_context(
                open_fleet(config.fleet, config.sampling, config.policy, run_dir=config.run_dir, stage=mesh.pp_rank)
            )
            if isinstance(fleet, ServerFleet):
                log.include(fleet.metrics)
                if config.fleet.colocated:
                    fleet.sleep()
            models = build_models(config, mesh, num_prompts=len(prompts))
        reward = config.reward
        verifier = stack.enter_context(AnswerVerifier(timeout_s=reward.timeout_s, num_workers=reward.num_workers))
        grader = ResponseGrader(
            verifier, tokenizer, ranks, num_threads=reward.num_workers, max_staleness=config.ppo.max_staleness
        )
        stack.callback(grader.close)
        fleet.listen(grader.begin)
        log.include(grader.metrics)
        stream = PromptStream(prompts, seed=config.seed, cursor=run.done.prompt_cursor)
        timeline = None
        if is_main and config.ppo.max_staleness:
            timeline = stack.enter_context(Timeline(config.run_dir / TIMELINE_FILE))
            log.listen(timeline.on_trainer)
        step_fleet, step_grader = with_options(config, fleet, grader, stream, log, timeline, is_main=is_main)
        parts = models.parts()
        if isinstance(step_fleet, GenerationAhead):
            parts["ahead"] = step_fleet
        run.restore(parts)
        memory = MemoryMeter(models.by_name(), ranks=ranks, device=mesh.device)
        log.listen(memory.on_span)
        log.include(memory.metrics)
        template = chat_template(config.data.template)
        step_end = StepEnd(
            config=config,
            num_steps=num_steps,
            store=run.directory.store,
            parts=parts,
            sources=model_paths(config),
            policy=models.policy,
            chat_template=template,
            stream=stream,
            log=log,
            ranks=ranks,
            preemption=run.preemption,
        )
        recorder = RolloutRecorder(config.generations, tokenizer=tokenizer, ranks=ranks, log=log)
        algorithm = compose(config)
        record_rollouts: RecordRollouts = recorder.record
        if is_main:
            meter = PerformanceMeter(
                config,
                needs_old_log_probs=algorithm.needs_old_log_probs,
                world_size=mesh.world_size,
                device=mesh.device,
            )
            log.listen(meter.on_span)
            log.include(meter.metrics)
            record_rollouts = meter.observing(record_rollouts)
        num_responses = config.evaluation.num_responses
        policy, critic, reference, step_fleet = in_turns(config, models, fleet, step_fleet, log)
        ppo.run(
            config,
            algorithm=algorithm,
            policy=policy,
            critic=critic,
            reference=reference,
            fleet=step_fleet,
            grader=step_grader,
            prompts=stream,
            evaluate=partial(evaluate, held_out, fleet, grader, num_responses=num_responses, seed=config.seed, log=log),
            record_rollouts=record_rollouts,
            ranks=mesh,
            log=log,
            num_done=run.done.step,
            on_step_end=step_end,
        )
        with ranks.share_fate("writing the final checkpoint"):
            weights, final = policy.hf_weights(), config.run_dir / "final"
            export_hf(weights, source=config.policy.path, target=final, is_writer=is_main, chat_template=template)
        if models.critic is not None and config.critic is not None:
            with ranks.share_fate("writing the final critic"):
                weights, final = models.critic.hf_weights(), config.run_dir / "final-critic"
                export_hf(weights, source=config.critic.path, target=final, is_writer=is_main)
        if is_main:
            summarise(config, log)
            run.directory.mark_finished()


def summarise(config: Config, log: RunLog) -> None:
    """Prints the held-out scores of the first and the last policy, and draws the curves."""
    metrics, picture = config.run_dir / METRICS_FILE, config.run_dir / "curves.png"
    if config.evaluation.data:
        rows = read_metrics(metrics)
        log.print_comparison(rows[0], rows[-1])
    try:
        draw_curves(metrics, picture)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {picture}: {error.strerror or error}; free some space and run tools/plot.py {config.run_dir}"
        ) from error
    log.console.print(f"metrics, curves.png and the final checkpoint are in {config.run_dir}")
