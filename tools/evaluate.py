"""Evaluates language models on benchmarks, and grades what they have written.

python tools/evaluate.py run --model runs/demo --data math500.json aime2024.json --output runs/demo-scores
python tools/evaluate.py run --model runs/demo --server http://127.0.0.1:8000 --data held_out.jsonl --output runs/live
python tools/evaluate.py show --input runs/demo-scores --wrong 10
python tools/evaluate.py compare --first runs/base-scores --second runs/demo-scores
python tools/evaluate.py grade --input generations.jsonl --output graded.jsonl
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, run_command
from megatron_orz.config import DType, FleetConfig, ModelConfig, OptimizerConfig, RewardConfig, SamplingConfig
from megatron_orz.evaluation.benchmark import Benchmark, load_benchmark
from megatron_orz.evaluation.compare import compare
from megatron_orz.evaluation.grade_file import grade_file
from megatron_orz.evaluation.records import (
    SCORES_FILE,
    ItemRecord,
    RecordFile,
    claim,
    read_identity,
    read_records,
)
from megatron_orz.evaluation.report import (
    comparison_table,
    flipped_items,
    published_table,
    response_table,
    score_table,
    wrong_items,
)
from megatron_orz.evaluation.run import Generate, answer_items
from megatron_orz.evaluation.summary import Summary, summarise
from megatron_orz.json_file import write_json
from megatron_orz.ranks import Ranks
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import OnAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_FAULTS = 20
_SAMPLED_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Run:
    """Asks a model every item of the benchmarks, grades the responses and prints the scores.

    An interrupted evaluation goes on where it stopped: give the same command again.
    """

    model: Path
    """A Hugging Face checkpoint, or the directory of a finished run."""
    data: tuple[Path, ...]
    """Benchmark files: docs/evaluation.md lists their forms."""
    output: Path
    """Directory of the records and scores."""
    server: str | None = None
    """Address of a vLLM server that serves the model already, such as that of a live run; its weights are asked."""
    num_responses: int = 16
    """Responses to each item."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_response_tokens=8000))
    fleet: FleetConfig = field(default_factory=lambda: FleetConfig(max_model_tokens=10048))
    """Without --server, where the model is run."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    dtype: DType = "float32"
    """Type of the weights."""
    template: str = "orz"
    """Name of a built-in prompt template (`orz`, `short`), or a text that holds `{problem}`."""
    max_prompt_tokens: int = 2048
    """Longer prompts are left out and named."""
    problem_column: str = "question"
    answer_column: str = "answer"
    option_seed: int = 0
    """Shuffles the options of GPQA."""
    max_items: int | None = None
    """Only the first items of each file."""
    seed: int = 0
    strict: bool = False
    """End at the first bad row instead of leaving it out."""

    def __post_init__(self) -> None:
        for name in ("num_responses", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")
        if self.max_items is not None and self.max_items < 1:
            raise ValueError(f"max_items {self.max_items} is not at least 1; leave it out for all items")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative; set it to 0 or more")
        if not self.data:
            raise ValueError("data names no file; give at least one benchmark file")
        if self.server is None:
            self.fleet.check_longest(
                max_prompt_tokens=self.max_prompt_tokens,
                max_response_tokens=self.sampling.max_response_tokens,
                prompt_option="max_prompt_tokens",
            )
        names = [path.stem for path in self.data]
        if len(set(names)) < len(names):
            raise ValueError(
                f"data holds two files of the same name ({', '.join(names)}), as their records are named; rename one"
            )


@dataclass(frozen=True, kw_only=True)
class Show:
    """Prints the scores of an evaluation, and its wrong items."""

    input: Path
    """Output directory of `run`."""
    wrong: int = 0
    """How many wrong items of each benchmark to list, the least solved first."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compares two evaluations item by item: the change with its interval, and which items flipped."""

    first: Path
    """Output directory of `run`."""
    second: Path
    """Output directory of `run`."""
    flips: int = 5
    """How many gained and lost items of each benchmark to list."""


@dataclass(frozen=True, kw_only=True)
class GradeRows:
    """Grades generations: adds `correct`, `extracted` and `timed_out` to rows with `response` and `answer`."""

    input: Path
    """A .jsonl file; `kind` (math, choice, code) and `finish_reason` of a row are heeded."""
    output: Path
    """Where to write, whole or not at all."""
    anywhere: bool = False
    r"""Take a \boxed{} outside of <answer> tags too, in responses without any."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    strict: bool = False
    """End at the first malformed row instead of leaving it out."""


def main() -> None:
    with plain_errors():
        run_command(
            {
                "run": (Run, run),
                "show": (Show, show),
                "compare": (Compare, compare_runs),
                "grade": (GradeRows, grade_rows),
            }
        )


def run(command: Run) -> None:
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers draws one for every model it loads
    path = model_directory(command.model)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    benchmarks = [load(command, file, tokenizer) for file in command.data]
    for benchmark in benchmarks:
        report_faults(f"{benchmark}", benchmark.dropped)
    summaries = []
    with (
        AnswerVerifier(timeout_s=command.reward.timeout_s, num_workers=command.reward.num_workers) as verifier,
        closing(ResponseGrader(verifier, tokenizer, Ranks(), num_threads=command.reward.num_workers)) as grader,
        open_generation(command, path, on_answer=grader.begin) as generate,
    ):
        for benchmark in benchmarks:
            records = answer(command, benchmark, generate, grader, verifier, tokenizer)
            summaries.append(summarise(benchmark.name, records))
    scores = {
        benchmark.name: {**asdict(summary), "dropped": benchmark.dropped}
        for benchmark, summary in zip(benchmarks, summaries, strict=True)
    }
    write_json(command.output / SCORES_FILE, scores)
    print_scores(summaries)
    print(f"records and scores are in {command.output}")


def load(command: Run, file: Path, tokenizer: PreTrainedTokenizerBase) -> Benchmark:
    return load_benchmark(
        file,
        tokenizer,
        template=command.template,
        max_prompt_tokens=command.max_prompt_tokens,
        problem_column=command.problem_column,
        answer_column=command.answer_column,
        option_seed=command.option_seed,
        max_items=command.max_items,
        is_strict=command.strict,
    )


def answer(
    command: Run,
    benchmark: Benchmark,
    generate: Generate,
    grader: ResponseGrader,
    verifier: AnswerVerifier,
    tokenizer: PreTrainedTokenizerBase,
) -> list[ItemRecord]:
    with RecordFile(command.output / f"{benchmark.name}.jsonl") as records, terminal.progress() as progress:
        task = progress.add_task(benchmark.name, total=len(benchmark.items) * command.num_responses)
        return answer_items(
            benchmark,
            generate,
            grader,
            verifier,
            tokenizer.decode,
            records,
            num_responses=command.num_responses,
            seed=command.seed,
            on_response=partial(progress.advance, task),
        )


@contextmanager
def open_generation(command: Run, path: Path, *, on_answer: OnAnswer) -> Iterator[Generate]:
    """What asks the model, once the output directory is known to be that of these weights.

    on_answer: called by a fleet as its answers come; those of --server are graded when all of them are there.
    """
    if command.server is not None:
        from megatron_orz.rollout.live import LiveServer

        timeout_s = command.fleet.request_timeout_s
        with LiveServer(command.server, command.sampling, request_timeout_s=timeout_s) as server:
            claim(command.output, identity(command, f"{server.url}, version {server.weight_version()}"))
            yield server.generate
        return
    from megatron_orz.rollout.fleet import open_fleet

    claim(command.output, identity(command, fingerprint(path)))
    # The optimizer is a part of every ModelConfig; nothing is trained here.
    model = ModelConfig(path=path, dtype=command.dtype, optimizer=OptimizerConfig(lr=1.0))
    with open_fleet(command.fleet, command.sampling, model, run_dir=command.output) as fleet:
        fleet.listen(on_answer)
        yield fleet.generate


def model_directory(path: Path) -> Path:
    """The checkpoint in a directory of a run or of a model. Raises ValueError where there is none."""
    for directory in (path / "final", path):
        if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
            return directory
    raise ValueError(
        f"{path} holds no Hugging Face checkpoint (config.json and .safetensors), nor a finished run's final/; "
        "convert a distributed checkpoint with tools/convert.py megatron-to-hf, or name the run's server with --server"
    )


def fingerprint(path: Path) -> str:
    """A digest of the sizes and of the first and last bytes of the weights."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as weights:
            digest.update(f"{file.name} {size} ".encode() + weights.read(_SAMPLED_BYTES))
            weights.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(weights.read())
    return digest.hexdigest()[:16]


def identity(command: Run, weights: str) -> dict[str, Any]:
    """What all records of an output directory have in common."""
    ours = {entry.name for entry in fields(Run)} - {"model", "data", "output", "server", "fleet", "strict"}
    values = {name: value for name, value in asdict(command).items() if name in ours}
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in command.data}
    return {"weights": weights, "data": digests, "fleet": command.fleet.kind, **values}


def show(command: Show) -> None:
    benchmarks = read_run(command.input)
    print_scores([summarise(name, records) for name, records in benchmarks.items()])
    console = terminal.console()
    for name, records in benchmarks.items():
        if command.wrong:
            console.print(f"\n{name}: {sum(record.score < 1 for record in records)} items are not always solved")
            console.print(wrong_items(records, limit=command.wrong))


def compare_runs(command: Compare) -> None:
    first, second = read_run(command.first), read_run(command.second)
    common = [name for name in first if name in second]
    if not common:
        raise ValueError(
            f"{command.first} ({', '.join(first)}) and {command.second} ({', '.join(second)}) have no benchmark in "
            "common; compare runs on the same files"
        )
    for name in sorted({*first, *second} - {*common}):
        print(f"{name} is in one of the two only, and is left out", file=sys.stderr)
    comparisons = [compare(name, first[name], second[name]) for name in common]
    console = terminal.console()
    console.print(comparison_table(comparisons))
    for comparison in comparisons:
        console.print(flipped_items(comparison, limit=command.flips))


def read_run(directory: Path) -> dict[str, list[ItemRecord]]:
    """The records of a run's benchmarks, by name. Raises ValueError where there are none."""
    names = [Path(file).stem for file in read_identity(directory)["data"]]
    files = {name: directory / f"{name}.jsonl" for name in names}
    records = {name: read_records(file) for name, file in files.items() if file.is_file()}
    records = {name: items for name, items in records.items() if items}
    if not records:
        raise ValueError(f"{directory} holds no records yet; let tools/evaluate.py run get on")
    return records


def grade_rows(command: GradeRows) -> None:
    faults: list[str] = []
    with (
        AnswerVerifier(timeout_s=command.reward.timeout_s, num_workers=command.reward.num_workers) as verifier,
        terminal.progress(in_bytes=True) as progress,
    ):
        size = command.input.stat().st_size if command.input.is_file() else None
        report = grade_file(
            command.input,
            command.output,
            verifier,
            anywhere=command.anywhere,
            is_strict=command.strict,
            on_fault=faults.append,
            on_row=partial(progress.advance, progress.add_task("grade", total=size)),
        )
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{report}; written to {command.output}")


def report_faults(title: str, faults: Sequence[str]) -> None:
    print(title, file=sys.stderr)
    for fault in faults[:SHOWN_FAULTS]:
        print(f"  {fault}", file=sys.stderr)
    if len(faults) > SHOWN_FAULTS:
        print(f"  and {len(faults) - SHOWN_FAULTS} more, all of them in {SCORES_FILE}", file=sys.stderr)


def print_scores(summaries: Sequence[Summary]) -> None:
    console = terminal.console()
    console.print(score_table(summaries))
    console.print(response_table(summaries))
    if (table := published_table(summaries)) is not None:
        console.print(table)


if __name__ == "__main__":
    main()
