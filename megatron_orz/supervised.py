"""Next-token training on conversations, on the engine of the PPO policy: cold starts, distillation, the demo's base.

Row n of the metrics tells how the model did before step n: `supervised/loss` is the cross-entropy in nats per learnt
token of the step, `evaluation/<file>/loss` that of held-out conversations.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from megatron_orz import terminal
from megatron_orz.algorithms.losses import next_token_loss
from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.checkpoint.recipe import recipe_of
from megatron_orz.checkpoint.step_end import StepEnd
from megatron_orz.checks import check_supervised
from megatron_orz.command_line import parse, plain_errors, rank, world_size
from megatron_orz.config import SupervisedConfig, to_json
from megatron_orz.data.demonstrations import ConversationReport, load_demonstrations, resolve_chat_template
from megatron_orz.data.packing import pack_demonstrations
from megatron_orz.data.stream import EpochStream
from megatron_orz.logs import METRICS_FILE, RunLog, writing
from megatron_orz.supervised_curves import draw_supervised_curves
from megatron_orz.trackers import check_trackers
from megatron_orz.types import DataParallel, Demonstration, Metrics, PackedBatch, Stateful

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_orz.engine.megatron_engine import PolicyEngine


def main(recipe: SupervisedConfig, *, prepare: Callable[[], None] | None = None) -> None:
    """The command line of a supervised recipe: its values are the defaults, every field can be overridden.

    prepare: makes files that the recipe needs and may lack. It is called once the command line is known to be sound,
    and not for a dry run.

    Ends the process with one sentence and exit code 2 for what a user can mend; ORZ_DEBUG=1 shows the traceback.
    """
    with plain_errors():
        config = parse(recipe)
        config.parallel.check_world_size(world_size())
        if prepare is not None and not config.dry_run:
            prepare()
        train_supervised(config)


def train_supervised(config: SupervisedConfig) -> None:
    """Trains as configured; returns when the last step is done and the final checkpoint is written.

    Raises ValueError for what does not fit the machine, the model or the data, before any model is built.
    """
    disable_progress_bar()  # transformers draws one for every model it loads, on every rank
    config.parallel.check_world_size(world_size())
    tokenizer = check_supervised(config)
    template = resolve_chat_template(config.data.template, tokenizer)
    demonstrations, held_out = _read_data(config, tokenizer, template)
    num_steps = config.num_steps(len(demonstrations))
    model = config.resolved_model(num_steps)
    check_trackers(config.tracking.trackers)
    if config.dry_run:
        if rank() == 0:
            print(f"{num_steps} steps of {config.num_conversations} conversations", file=sys.stderr)
            print(to_json(config), end="")
        return

    # Importing megatron-core takes seconds: what can fail has failed by now.
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.random_state import RandomState
    from megatron_orz.memory import MemoryMeter
    from megatron_orz.start import start_run

    with contextlib.ExitStack() as stack:
        recipe = recipe_of(config, ()) | {"data.content": _digest(demonstrations)}
        run = start_run(stack, config, recipe, num_steps=num_steps)
        if run is None:
            if rank() == 0:
                print(f"{config.run_dir} holds this run, finished; set run_dir, or begin anew with --fresh")
            return
        mesh, log = run.mesh, run.log
        with log.console.status("building the model"):
            policy = PolicyEngine(model, mesh)
        parts: dict[str, Stateful] = {"random": RandomState(mesh.rank), "policy": policy}
        run.restore(parts)
        memory = MemoryMeter({"policy": policy}, ranks=run.ranks, device=mesh.device)
        log.listen(memory.on_span)
        log.include(memory.metrics)
        stream = EpochStream(demonstrations, seed=config.seed, cursor=run.done.prompt_cursor)
        step_end = StepEnd(
            config=config,
            num_steps=num_steps,
            store=run.directory.store,
            parts=parts,
            sources={"policy": model.path},
            policy=policy,
            chat_template=template,
            stream=stream,
            log=log,
            ranks=run.ranks,
            preemption=run.preemption,
        )
        packs = {name: _packs(config, rows, mesh) for name, rows in held_out.items()}
        run_steps(config, policy, stream, packs, mesh, log, num_steps, run.done.step, step_end)
        with run.ranks.share_fate("writing the final checkpoint"):
            weights, final = policy.hf_weights(), config.run_dir / "final"
            export_hf(weights, source=model.path, target=final, is_writer=run.is_main, chat_template=template)
        if run.is_main:
            _draw(config.run_dir)
            log.console.print(f"metrics, curves.png and the final checkpoint are in {config.run_dir}")
            run.directory.mark_finished()


def run_steps(
    config: SupervisedConfig,
    policy: PolicyEngine,
    stream: EpochStream[Demonstration],
    held_out: Mapping[str, Sequence[PackedBatch]],
    ranks: DataParallel,
    log: RunLog,
    num_steps: int,
    num_done: int,
    on_step_end: Callable[[int], None],
) -> None:
    """The loop: an optimizer step on the next conversations, until `num_steps` are done.

    held_out: this rank's packs of every file, by its name.
    """
    with log.progress("supervised", total=num_steps - num_done) as advance:
        for step in range(num_done, num_steps + 1):
            start = time.perf_counter()
            losses: Metrics = {}
            if step % config.held_out_interval == 0 or step == num_steps:
                with log.span("evaluate"):
                    losses = {
                        f"evaluation/{name}/loss": cross_entropy(policy, packs, ranks)
                        for name, packs in held_out.items()
                    }
            if step == num_steps:
                log.record(step, losses)
                return
            batches = _packs(config, stream.take(config.num_conversations), ranks, seed=config.seed + step)
            with log.span("train"):
                metrics = policy.step(batches, next_token_loss)
            loss = metrics.pop("policy/loss")
            num_tokens = sum(len(batch.tokens) for batch in batches) * ranks.dp_size
            speed = num_tokens / (time.perf_counter() - start)
            log.record(step, {"supervised/loss": loss, **metrics, **losses, "tokens_per_s": speed})
            on_step_end(step + 1)
            advance()


def cross_entropy(policy: PolicyEngine, packs: Sequence[PackedBatch], ranks: DataParallel) -> float:
    """Nats per learnt token of the packs of all ranks: -sum log pi(target) / number of targets."""
    sums = torch.zeros(2, dtype=torch.float64)
    for pack, log_probs in zip(packs, policy.infer(packs), strict=True):
        sums += torch.stack([-log_probs[pack.loss_mask].double().sum(), pack.loss_mask.double().sum()])
    negative_log_prob, num_tokens = ranks.dp_all_gather(sums).sum(0).tolist()
    return float(negative_log_prob / num_tokens)


def _packs(
    config: SupervisedConfig, demonstrations: Sequence[Demonstration], ranks: DataParallel, *, seed: int = 0
) -> list[PackedBatch]:
    return pack_demonstrations(
        demonstrations,
        max_pack_tokens=config.data.max_pack_tokens,
        dp_size=ranks.dp_size,
        dp_rank=ranks.dp_rank,
        pad_multiple=ranks.pack_multiple,
        seed=seed,
    )


def _read_data(
    config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[Demonstration], dict[str, list[Demonstration]]]:
    """What is to be learnt, and what is held out, by the name of its file."""
    data, is_main = config.data, rank() == 0
    with terminal.progress(Console(stderr=True, quiet=not is_main)) as bar:
        task = bar.add_task("reading conversations", total=None)

        def load(paths: Sequence[Path]) -> tuple[list[Demonstration], ConversationReport]:
            return load_demonstrations(
                paths,
                tokenizer,
                template=template,
                learn=data.learn,
                max_tokens=data.max_tokens,
                on_conversation=lambda: bar.advance(task),
            )

        demonstrations, report = load(data.train)
        held_out = {path.stem: load([path])[0] for path in data.held_out}
    if is_main:
        print(f"training data: {report}", file=sys.stderr if config.dry_run else sys.stdout, flush=True)
    return demonstrations, held_out


def _digest(demonstrations: Sequence[Demonstration]) -> str:
    digest = hashlib.sha256()
    for demonstration in demonstrations:
        digest.update(repr((demonstration.token_ids, demonstration.loss_mask)).encode())
    return digest.hexdigest()[:16]


def _draw(run_dir: Path) -> None:
    picture = run_dir / "curves.png"
    with writing(picture):
        draw_supervised_curves(run_dir / METRICS_FILE, picture)
