"""Benchmarks the whole loop: generate, grade, infer, update, sync, beside TRL's GRPO trainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from megatron_orz import terminal
from megatron_orz.benchmark import countdown, environment, results, workload
from megatron_orz.benchmark.countdown_work import StepTimes, Work
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.loop_report import Loop, as_json, memory_table, table
from megatron_orz.benchmark.options import check_positive
from megatron_orz.benchmark.own_process import call_in_process
from megatron_orz.benchmark.trl_trainer import run_trl
from megatron_orz.config import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    FleetConfig,
    GenerationsConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)
from megatron_orz.engine.high_water import peak_bytes

LengthKind = Literal["equal", "long-tailed"]
Contender = Literal["ours", "trl", "critic", "vllm"]

NAMES: dict[Contender, str] = {
    "ours": OURS,
    "trl": "TRL",
    "critic": f"{OURS}, with a critic",
    "vllm": f"{OURS}, with vLLM",
}

OPTIMIZER = OptimizerConfig(lr=1e-6)
TARGETS: dict[LengthKind, float] = {"equal": 1.2, "long-tailed": 2.0}
"""How many times as fast as TRL ours shall be."""
NUM_WARM_UP = 1
"""First steps that do not count."""


@dataclass(frozen=True)
class Arguments:
    """Times whole steps of GRPO with the `local` fleet beside TRL's GRPO trainer: the same model of 0.43 M parameters,
    prompts, sampling, reward and optimizer; and what a critic, and a vLLM server, cost on top.

    The model counts down from a number in its prompt, so that the lengths of responses are known: all equal, or
    log-normal with the longest 16 times the median. Every implementation runs in a process of its own.
    """

    only: tuple[LengthKind, ...] = get_args(LengthKind)
    """Lengths to run."""
    contenders: tuple[Contender, ...] = get_args(Contender)
    """What to run, ours among them."""
    num_prompts: int = 64
    """Prompts a step."""
    num_responses: int = 8
    """Responses to each prompt."""
    response_tokens: int = 32
    """Length of all responses where they are equal."""
    longest: int = 256
    """The longest response where they are not; the median is a sixteenth."""
    prompt_tokens: int = 16
    """Length of every prompt."""
    max_pack_tokens: int = 16384
    """Of our packs."""
    trl_rows: int = 64
    """Rollouts in a micro-batch of TRL."""
    num_steps: int = 6
    """Steps of each run, the first of which does not count."""
    timeout_s: float = 900.0
    """Deadline of one run."""
    output: Path | None = None
    """Where the figures go; by default bench/results/<device>-end-to-end.json."""

    def __post_init__(self) -> None:
        if self.num_steps <= NUM_WARM_UP:
            raise ValueError(f"num_steps is {self.num_steps}; the first does not count, so give at least 2")
        check_positive(self, "num_prompts", "prompt_tokens", "max_pack_tokens", "trl_rows")
        for name in ("response_tokens", "longest"):
            if not 2 <= getattr(self, name) <= countdown.MAX_NUMBER:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; the model counts down from 2 to {countdown.MAX_NUMBER}"
                )
        if self.num_responses < 2:
            raise ValueError(f"num_responses is {self.num_responses}; GRPO compares the responses of a prompt: give 2")
        if self.num_prompts * self.num_responses % self.trl_rows:
            raise ValueError(
                f"trl_rows {self.trl_rows} does not divide the {self.num_prompts * self.num_responses} rollouts of a "
                "step into equal micro-batches; choose one that does"
            )
        if "ours" not in self.contenders:
            raise ValueError("contenders lacks ours, beside which everything else is measured; add it")

    def response_lengths(self, kind: LengthKind) -> tuple[int, ...]:
        """Of each prompt."""
        if kind == "equal":
            return (self.response_tokens,) * self.num_prompts
        lengths = workload.response_lengths(self.num_prompts, self.longest, seed=0)
        return tuple(max(2, length) for length in lengths)  # an answer, and the end


def run(arguments: Arguments, console: Console | None = None) -> Path:
    """Prints a table for each kind of lengths; returns the path of the results file."""
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    disable_progress_bar()  # transformers draws one for the model it saves
    groups = []
    with terminal.progress() as progress:
        for kind in arguments.only:
            loop = measure(kind, arguments, progress)
            console.print(table(loop))
            console.print(memory_table(loop))
            groups.append(as_json(loop))
    content = {"environment": environment.describe(device), "arguments": asdict(arguments), "groups": groups}
    return results.write(arguments.output, "end-to-end", content, device, console)


def measure(kind: LengthKind, arguments: Arguments, progress: Progress) -> Loop:
    """Runs every contender on the same prompts, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            folder=Path(folder),
            response_lengths=arguments.response_lengths(kind),
            num_responses=arguments.num_responses,
            num_steps=arguments.num_steps,
            prompt_tokens=arguments.prompt_tokens,
            max_pack_tokens=arguments.max_pack_tokens,
            trl_rows=arguments.trl_rows,
        )
        work.write()
        rows: dict[str, StepTimes] = {}
        missing: dict[str, str] = {}
        for contender in arguments.contenders:
            name = NAMES[contender]
            task = progress.add_task(f"{kind} lengths: {arguments.num_steps} steps of {name}")
            try:
                rows[name] = checked(name, in_process_of_its_own(contender, work, arguments.timeout_s), work)
            except RuntimeError as error:  # a row of the table must not end the others
                if contender == "ours":
                    raise
                missing[name] = str(error)
            progress.remove_task(task)
    shortest, longest = min(work.response_lengths), work.max_response_tokens
    spread = f"{shortest} to {longest} tokens, median {median(work.response_lengths):g}"
    return Loop(
        lengths=kind,
        shape=f"{work.num_prompts} prompts x {work.num_responses} responses of "
        + (spread if shortest < longest else f"{longest} tokens"),
        num_rollouts=work.num_prompts * work.num_responses,
        num_response_tokens=work.num_response_tokens,
        num_warm_up=NUM_WARM_UP,
        rows=rows,
        missing=missing,
        baseline=NAMES["trl"],
        target=TARGETS[kind],
    )


def checked(name: str, steps: StepTimes, work: Work) -> StepTimes:
    """The same, once it is known that a run did the work.

    Raises RuntimeError when it made another number of tokens, or when its rewards are not those of coin flips.
    """
    if set(steps.num_response_tokens) != {work.num_response_tokens}:
        raise RuntimeError(
            f"{name} made {steps.num_response_tokens} response tokens in its steps, not {work.num_response_tokens} in "
            "each: it did other work, and its times say nothing"
        )
    if not 0.25 < fmean(steps.rewards) < 0.75:
        raise RuntimeError(f"{name}: the mean reward is {fmean(steps.rewards):.2f}, but every other answer is right")
    return steps


def in_process_of_its_own(contender: Contender, work: Work, timeout_s: float) -> StepTimes:
    """Runs one contender. What it prints goes to a file, whose end is shown if it fails."""
    log = work.folder / f"{contender}.log"
    try:
        return call_in_process(_run_quietly, contender, work, log, timeout_s=timeout_s)
    except Exception as error:  # of another project, perhaps: whatever it is, its last words are shown
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""
        raise RuntimeError(f"{NAMES[contender]} failed: {type(error).__name__}: {error}\n{tail}") from error


def _run_quietly(contender: Contender, work: Work, log: Path) -> StepTimes:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runs: Mapping[Contender, Callable[[Work], StepTimes]] = {
        "ours": run_ours,
        "trl": partial(run_trl, optimizer=OPTIMIZER),
        "critic": partial(run_ours, critic=True),
        "vllm": partial(run_ours, fleet=FleetConfig(kind="vllm", max_model_tokens=2048, cpu_threads=1)),
    }
    return runs[contender](work)


def run_ours(work: Work, *, critic: bool = False, fleet: FleetConfig | None = None) -> StepTimes:
    """A run of `train` in this process."""
    from megatron_orz.engine.platform import device
    from megatron_orz.logs import METRICS_FILE, read_metrics
    from megatron_orz.train import train

    config = our_config(work, critic=critic, fleet=fleet or FleetConfig(kind="local", max_model_tokens=2048))
    train(config)
    rows = [row for row in read_metrics(config.run_dir / METRICS_FILE) if "perf/step_s" in row]
    num_rollouts = work.num_prompts * work.num_responses
    peaks = [2**30 * value for row in rows for name, value in row.items() if name.endswith("_peak_gib")]
    return StepTimes(
        seconds=[row["perf/step_s"] for row in rows],
        num_response_tokens=[round(row["response/length_mean"] * num_rollouts) for row in rows],
        rewards=[row["reward/mean"] for row in rows],
        peak_bytes=max(peak_bytes(device()), *map(round, peaks)),
        metrics=[
            {name: x for name, x in row.items() if name.startswith(("perf/", "time/", "memory/"))} for row in rows
        ],
    )


def our_config(work: Work, *, critic: bool, fleet: FleetConfig) -> Config:
    """GRPO, or PPO with a critic that takes one update a step."""
    ppo = PPOConfig(
        num_steps=work.num_steps,
        num_prompts=work.num_prompts,
        num_responses=work.num_responses,
        advantages="group_normalised",
        whiten_advantages=False,
    )
    if critic:
        ppo = replace(ppo, advantages="gae", num_critic_updates=1)
    return Config(
        run_dir=work.folder / ("run" + "-critic" * critic + "-" + fleet.kind),
        policy=ModelConfig(path=work.model, optimizer=OPTIMIZER),
        critic=CriticConfig(path=work.model, optimizer=OPTIMIZER) if critic else None,
        ppo=ppo,
        sampling=SamplingConfig(max_response_tokens=work.max_response_tokens, stop=()),
        data=DataConfig(
            train=(work.prompt_file,),
            template="{problem}",
            max_prompt_tokens=work.prompt_tokens,
            max_pack_tokens=work.max_pack_tokens,
        ),
        fleet=fleet,
        checkpoint=CheckpointConfig(interval=0),
        generations=GenerationsConfig(interval=0),
    )
