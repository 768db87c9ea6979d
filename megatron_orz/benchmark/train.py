"""Benchmarks the trainer: policy and critic, inferring and taking an optimizer step, beside transformers and torch."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar

from megatron_orz import terminal
from megatron_orz.algorithms.losses import ClippedValueLoss, policy_loss
from megatron_orz.benchmark import environment, results, workload
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.measure import interleaved_times, peak_bytes_of_warm
from megatron_orz.benchmark.options import check_positive
from megatron_orz.benchmark.training_report import Phase, Row, as_json, table
from megatron_orz.benchmark.transformers_trainer import TransformersTrainer, packed_rows, padded_rows
from megatron_orz.benchmark.workload import Lengths, ModelName
from megatron_orz.config import CriticConfig, DType, ModelConfig, OptimizerConfig, ParallelConfig, Recompute
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.flops import model_flops
from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
from megatron_orz.engine.parallel import Mesh, open_mesh
from megatron_orz.engine.peak_flops import peak_flops
from megatron_orz.types import Experience, LossOutput

Task = Literal["infer", "values", "critic", "policy"]

PACKED, PADDED, BY_LENGTH = "HF packed", "HF padded", "HF padded by length"
OPTIMIZER = OptimizerConfig(lr=1e-10)
"""So slow that those who share a model all see the loss before the first step."""
CLIP_EPS = 0.2
LIMITS: dict[DType, float] = {"float32": 1e-3, "bfloat16": 0.05}
"""What an implementation may be off by from ours, relative: more means that it computes something else."""


@dataclass(frozen=True)
class Arguments:
    """Times the four things the trainer does in a step: the policy's log-probabilities (infer), the critic's values
    (values), an optimizer step of the critic, and one of the policy.

    Everything has the same random weights, tokens, loss and optimizer, and takes turns. Response lengths are those of
    the recipe, scaled down: log-normal, the longest allowed 16 times the median.
    """

    only: tuple[Task, ...] = get_args(Task)
    """Tasks to run."""
    model: ModelName = "smollm2"
    """Shape of the model."""
    layers: int | None = None
    """Of the model, where it shall have fewer than is published."""
    vocabulary: int | None = None
    """The same, of its words."""
    num_sequences: int = 32
    """In the mini-batch."""
    prompt_tokens: int = 16
    """Length of every prompt."""
    max_response_tokens: int = 512
    """The longest response; the median is a sixteenth."""
    max_pack_tokens: int = 1024
    """Of a pack, ours and of packed transformers."""
    padded_rows: int = 8
    """Sequences in a micro-batch of padded transformers; its trainers' default is 8."""
    without: tuple[str, ...] = ()
    """Implementations to leave out, as the table names them."""
    recompute: Recompute = "none"
    """Of ours."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    dtype: DType | None = None
    """Of the weights; by default float32 on a CPU and bfloat16 on CUDA."""
    repeats: int = 3
    """Timed runs of each implementation, after one to warm up."""
    memory: bool = True
    """One more run of each implementation for its peak memory."""
    traces: Path | None = None
    """A folder for a Chrome trace of one more run of ours in each task, which Perfetto shows."""
    output: Path | None = None
    """Where the figures go; by default bench/results/<device>-train.json."""

    def __post_init__(self) -> None:
        if (self.device == "cuda") != torch.cuda.is_available():
            raise ValueError(
                f"device is {self.device}, but the trainer uses CUDA where and only where there is one; "
                "set it to the other, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        sizes = ("num_sequences", "prompt_tokens", "max_response_tokens", "padded_rows")
        check_positive(self, "repeats", "layers", "vocabulary", *sizes)
        longest = self.prompt_tokens + self.max_response_tokens
        if longest > self.max_pack_tokens:
            raise ValueError(
                f"a prompt and a response of {longest} tokens do not fit max_pack_tokens {self.max_pack_tokens}; "
                "raise it, or lower max_response_tokens"
            )
        if OURS in self.without:
            raise ValueError(f"without has {OURS}, beside which everything else is measured; leave it out")

    @property
    def weights_dtype(self) -> DType:
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")


@dataclass
class Contender:
    """One implementation of a task."""

    run: Callable[[], Mapping[str, Tensor]]
    """Returns what it computed, by name, for comparison."""
    resident_bytes: Callable[[], Mapping[str, int]]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the last run."""

    def __call__(self) -> None:
        self.outputs = self.run()


def run(arguments: Arguments, console: Console | None = None) -> Path:
    """Prints a table for each task; returns the path of the results file."""
    console = console or Console()
    disable_progress_bar()  # transformers draws one for every model it loads
    groups = []
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        mesh = stack.enter_context(open_mesh(ParallelConfig(), seed=0))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = workload.model_config(arguments.model, num_layers=arguments.layers, vocab_size=arguments.vocabulary)
        workload.save_random_model(config, folder, dtype=getattr(torch, arguments.weights_dtype))
        lengths = Lengths(
            num_sequences=arguments.num_sequences,
            prompt_tokens=arguments.prompt_tokens,
            max_response_tokens=arguments.max_response_tokens,
        )
        rollouts = workload.random_rollouts(lengths, vocab_size=config.vocab_size, seed=0)
        experience = workload.random_experience(
            rollouts, max_pack_tokens=arguments.max_pack_tokens, vocab_size=config.vocab_size, seed=0
        )
        for task in arguments.only:
            phase = measure(task, experience, folder, mesh, arguments, progress)
            console.print(table(phase))
            groups.append(as_json(phase))
    return results.write(
        arguments.output,
        "train",
        {"environment": environment.describe(mesh.device), "arguments": asdict(arguments), "groups": groups},
        mesh.device,
        console,
    )


def measure(
    task: Task,
    experience: Sequence[Experience],
    folder: Path,
    mesh: Mesh,
    arguments: Arguments,
    progress: Progress,
) -> Phase:
    """Builds the models of a task, compares what they compute, then times them in turns.

    Exits if one of the others computes something else than ours.
    """
    where = progress.add_task(f"{task}: building")
    contenders = build(task, experience, folder, mesh, arguments)
    dtype = getattr(torch, arguments.weights_dtype)
    peak = peak_flops(mesh.device, dtype)
    errors: dict[str, dict[str, float]] = {}
    for name, contender in contenders.items():
        progress.update(where, description=f"{task}: {name}, first run")
        contender()
        errors[name] = relative_errors(contender.outputs, contenders[OURS].outputs)
        if max(errors[name].values()) > LIMITS[arguments.weights_dtype]:
            sys.exit(f"{task}: {name} computes something else than {OURS}: {errors[name]}; nothing was timed")
    num_runs, num_done = len(contenders) * arguments.repeats, 0

    def on_run() -> None:
        nonlocal num_done
        num_done += 1
        progress.update(where, description=f"{task}: timing, run {num_done} of {num_runs}")

    times = interleaved_times(contenders, mesh.device, num_repeats=arguments.repeats, on_run=on_run, is_warm=True)
    rows = {}
    for name, contender in contenders.items():
        progress.update(where, description=f"{task}: memory of {name}")
        peak_bytes = peak_bytes_of_warm(contender, mesh.device) if arguments.memory else None
        rows[name] = Row(
            times_s=times[name],
            errors=errors[name],
            resident_bytes=dict(contender.resident_bytes()),
            peak_bytes=peak_bytes,
        )
    if arguments.traces is not None:
        progress.update(where, description=f"{task}: trace")
        write_trace(contenders[OURS], arguments.traces / f"{task}.json.gz")
    progress.remove_task(where)
    lengths = torch.cat([e.cu_seqlens.diff() for e in experience]).tolist()
    architecture = read_architecture(folder)
    flops = model_flops(
        architecture,
        lengths,
        num_head_tokens=sum(int(e.loss_mask.sum()) for e in experience),
        value_head=task in ("values", "critic"),
    )
    is_step = task in ("critic", "policy")
    return Phase(
        task=task,
        shape=f"{arguments.model}, {architecture.num_layers} layers, {arguments.weights_dtype}, "
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} positions",
        num_tokens=sum(lengths),
        flops=flops.training if is_step else flops.forward,
        recomputed_flops=flops.recomputed(arguments.recompute) if is_step else 0,
        peak=peak,
        rows=rows,
        targets={PACKED: 1.1 if mesh.device.type == "cpu" else 1.3, PADDED: 2.0} if is_step else {},
    )


def build(
    task: Task, experience: Sequence[Experience], folder: Path, mesh: Mesh, arguments: Arguments
) -> dict[str, Contender]:
    """All implementations of a task, with equal weights; ours first."""
    dtype, is_step = arguments.weights_dtype, task in ("critic", "policy")
    options: dict[str, Any] = {
        "path": folder, "optimizer": OPTIMIZER, "dtype": dtype, "recompute": arguments.recompute
    }  # fmt: skip
    value_head = None
    engine: PolicyEngine | CriticEngine
    if task in ("infer", "policy"):
        engine = PolicyEngine(ModelConfig(**options), mesh, is_frozen=not is_step)
    else:
        engine = CriticEngine(CriticConfig(**options), mesh)
        value_head = engine.model.output_layer.weight.detach()
    name, loss = engine.name, _loss(engine)

    def step() -> dict[str, Tensor]:
        metrics = engine.step(experience, loss)
        return {what: torch.tensor(metrics[f"{name}/{what}"]) for what in ("loss", "grad_norm")}

    def infer() -> dict[str, Tensor]:
        outputs = engine.infer(experience)
        return {"outputs": torch.cat([x[e.loss_mask] for x, e in zip(outputs, experience, strict=True)])}

    contenders = {OURS: Contender(step if is_step else infer, engine.resident_bytes)}
    layouts = {
        PACKED: packed_rows(experience),
        PADDED: padded_rows(experience, arguments.padded_rows),
        BY_LENGTH: padded_rows(experience, arguments.padded_rows, by_length=True),
    }
    trainer = TransformersTrainer(
        folder,
        "critic" if value_head is not None else "policy",
        OPTIMIZER,
        dtype=getattr(torch, dtype),
        device=mesh.device,
        value_head=value_head,
    )
    for layout, batches in layouts.items():
        if layout not in arguments.without:
            rows = [batch.to(mesh.device) for batch in batches]
            of_step = partial(trainer.step, rows, loss)
            contenders[layout] = Contender(of_step if is_step else partial(trainer.infer, rows), trainer.resident_bytes)
    return contenders


def write_trace(run: Callable[[], object], path: Path) -> None:
    """Writes the Chrome trace of one run: every operator with its time, on the CPU and on CUDA."""
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        run()
    profiler.export_chrome_trace(str(path))


def _loss(engine: PolicyEngine | CriticEngine) -> Callable[..., LossOutput]:
    if isinstance(engine, PolicyEngine):
        return partial(policy_loss, clip_eps=CLIP_EPS)
    return ClippedValueLoss(CLIP_EPS)


def relative_errors(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| in the 2-norm, of each output. Those of many tokens are sorted: layouts order them differently."""
    errors = {}
    for name, ours in expected.items():
        a, b = (x.double().flatten().sort().values for x in (outputs[name], ours))
        errors[name] = float((a - b).norm() / b.norm())
    return errors
