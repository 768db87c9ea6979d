"""Makes training data from files of problems: collects, filters, and says why every row stayed or went.

python tools/curate.py run --input raw.jsonl numina/ --output data/math --evaluation math500.json aime2024.json
python tools/curate.py run --input raw.jsonl --output data/math --difficulty.model models/base   # pass rates as well
python tools/curate.py explain --output data/math --row 1042
python tools/curate.py synthesize --task countdown --level 2 --num-problems 5000 --output countdown.jsonl
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from megatron_orz import terminal
from megatron_orz.command_line import plain_errors, run_command
from megatron_orz.config import DType, FleetConfig, ModelConfig, OptimizerConfig, RewardConfig, SamplingConfig
from megatron_orz.data.curation.answers import judge_answers
from megatron_orz.data.curation.collect import Columns
from megatron_orz.data.curation.contamination import Decontamination
from megatron_orz.data.curation.difficulty import Difficulty, Sampler, fleet_sampler
from megatron_orz.data.curation.duplicates import Duplicates, Paraphrases
from megatron_orz.data.curation.embeddings import Embedder
from megatron_orz.data.curation.language import Languages
from megatron_orz.data.curation.outputs import read_decision, write_outputs
from megatron_orz.data.curation.pipeline import curate
from megatron_orz.data.curation.report import write_report
from megatron_orz.data.curation.rules import Rules
from megatron_orz.data.curation.stage import Advance, Candidate, Stage, Verdict
from megatron_orz.data.curation.store import Store, file_digest
from megatron_orz.data.generators.catalogue import make
from megatron_orz.data.prompts import resolve_template
from megatron_orz.data.reading import data_files, read_problems
from megatron_orz.rewards.math_answer import Verifier
from megatron_orz.whole_file import whole_file


@dataclass(frozen=True, kw_only=True)
class Run:
    """Curates problems. An interrupted run goes on with the same command; so does one with more stages."""

    input: tuple[Path, ...]
    """.jsonl, .parquet, .arrow, .json in the recipe's form, or directories of them (datasets saved to disk)."""
    output: Path
    """Directory for train.jsonl, hard.jsonl, decisions.parquet, report.html, summary.json, and stages/."""
    evaluation: tuple[Path, ...] = ()
    """Evaluation sets that no training problem may come from."""
    strict: bool = False
    """End with an error when a row cannot be read, instead of counting it."""
    columns: Columns = field(default_factory=Columns)
    rules: Rules = field(default_factory=Rules)
    languages: Languages = field(default_factory=Languages)
    duplicates: Duplicates = field(default_factory=Duplicates)
    decontamination: Decontamination = field(default_factory=Decontamination)
    verifier: RewardConfig = field(default_factory=RewardConfig)
    encoder: Path | None = None
    """Hugging Face encoder or language model whose embeddings find paraphrases; none leaves that out."""
    paraphrases: Paraphrases = field(default_factory=Paraphrases)
    difficulty: Difficulty = field(default_factory=Difficulty)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_response_tokens=6000))
    """How the model of the difficulty answers."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    dtype: DType = "bfloat16"
    """Type of the model's weights while it answers."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("--input names no file; give at least one")
        resolve_template(self.difficulty.template)
        if self.difficulty.model:
            self.fleet.check_longest(
                max_prompt_tokens=self.difficulty.max_prompt_tokens,
                max_response_tokens=self.sampling.max_response_tokens,
                prompt_option="difficulty.max_prompt_tokens",
            )
        for model in (self.encoder, self.difficulty.model):
            if model and not (model / "config.json").is_file():
                raise ValueError(f"{model} holds no config.json; name a Hugging Face checkpoint")


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Tells why a row stayed or went."""

    output: Path
    """The --output of a curation."""
    row: int
    """The row's number among all rows, as in decisions.parquet and the report."""


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Makes reasoning problems to order, all different, each with its only right answer."""

    task: str
    """`arithmetic`, `countdown`, `logic`, or `reasoning-gym:NAME` for a data set of that library."""
    level: int
    """Difficulty, from 1."""
    num_problems: int
    output: Path
    """The .jsonl file to write."""
    seed: int = 0


def main() -> None:
    with plain_errors():
        run_command({"run": (Run, run), "explain": (Explain, explain), "synthesize": (Synthesize, synthesize)})


def run(command: Run) -> None:
    files = list(dict.fromkeys(file for path in command.input for file in data_files(path)))
    store = Store(command.output / "stages")
    planned = stages(command, store)
    command.output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(command.output / ".lock", timeout=0):
            curation = curate(
                files,
                planned,
                columns=command.columns,
                store=store,
                progress=bar,
                strict=command.strict,
            )
            summary = write_outputs(curation, command.output, is_hard=command.difficulty.is_hard)
            write_report(command.output / "report.html", curation, notes=notes(command))
    except Timeout as error:
        raise ValueError(
            f"another process is curating into {command.output}; wait, or name another --output"
        ) from error
    table = terminal.table(None, ["stage"], ["rows", "left"], notes=True)
    for name, stage in summary["stages"].items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in stage["dropped"].items())
        table.add_row(name, f"{stage['rows']:,}", f"{stage['kept']:,}", reasons)
    terminal.console().print(table)
    for note in notes(command):
        print(f"note: {note}")
    print(f"{summary['kept']:,} of {summary['rows']:,} rows stay; {command.output / 'report.html'} tells why")


def stages(command: Run, store: Store) -> list[Stage]:
    """The stages, the cheap ones first."""
    chosen = [
        Stage(name="rules", judge=command.rules.judge, identity=asdict(command.rules)),
        Stage(name="language", judge=command.languages.judge, identity=asdict(command.languages)),
        Stage(name="duplicates", judge=command.duplicates.judge, identity=asdict(command.duplicates)),
    ]
    if command.evaluation:
        files = [file for path in command.evaluation for file in data_files(path)]
        problem_column, answer_column = command.columns.problem, command.columns.answer
        read = partial(read_problems, problem_column=problem_column, answer_column=answer_column)
        problems = [problem for file in files for problem in read(file)]
        chosen.append(
            Stage(
                name="contamination",
                judge=partial(command.decontamination.judge, evaluation=problems),
                identity=asdict(command.decontamination) | {"evaluation": [*map(file_digest, files)]},
            )
        )
    chosen.append(
        Stage(
            name="answers", judge=partial(_judge_answers, command), identity={"timeout_s": command.verifier.timeout_s}
        )
    )
    if command.encoder:
        identity = model_identity(command.encoder)
        embed = Embedder(command.encoder, store, identity=identity)
        chosen.append(
            Stage(
                name="paraphrases",
                judge=partial(command.paraphrases.judge, embed=embed),
                identity=asdict(command.paraphrases) | {"encoder": identity},
            )
        )
    difficulty = command.difficulty
    if difficulty.model is not None:
        identity = {
            "model": model_identity(difficulty.model),
            "dtype": command.dtype,
            "sampling": asdict(command.sampling),
        }
        judge = partial(difficulty.judge, open_sampler=partial(open_sampler, command), store=store, identity=identity)
        chosen.append(
            Stage(
                name="difficulty", judge=judge, identity=difficulty.settings | identity, work=difficulty.num_responses
            )
        )
    return chosen


def _judge_answers(command: Run, candidates: Sequence[Candidate], advance: Advance) -> list[Verdict]:
    settings = command.verifier
    with Verifier(timeout_s=settings.timeout_s, num_workers=settings.num_workers) as verifier:
        return judge_answers(candidates, advance, recognise=verifier.recognise)


@contextlib.contextmanager
def open_sampler(command: Run) -> Iterator[Sampler]:
    """The fleet and the verifier of the difficulty stage."""
    # Importing transformers takes seconds.
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from megatron_orz.ranks import Ranks
    from megatron_orz.rewards.grading import ResponseGrader
    from megatron_orz.rewards.verifiers import AnswerVerifier
    from megatron_orz.rollout.fleet import open_fleet

    disable_progress_bar()
    difficulty, verifier = command.difficulty, command.verifier
    assert difficulty.model is not None
    tokenizer = AutoTokenizer.from_pretrained(difficulty.model, local_files_only=True, trust_remote_code=False)
    # A fleet serves what a trainer trains; here nothing is trained, and the learning rate is never read.
    model = ModelConfig(path=difficulty.model, optimizer=OptimizerConfig(lr=1e-6), dtype=command.dtype)
    with (
        open_fleet(command.fleet, command.sampling, model, run_dir=command.output) as fleet,
        AnswerVerifier(timeout_s=verifier.timeout_s, num_workers=verifier.num_workers) as graders,
        contextlib.closing(ResponseGrader(graders, tokenizer, Ranks(), num_threads=verifier.num_workers)) as grader,
    ):
        fleet.listen(grader.begin)
        yield fleet_sampler(difficulty, tokenizer, fleet, grader)


def model_identity(path: Path) -> dict[str, Any]:
    """Tells one checkpoint from another by its files, without reading gigabytes."""
    stats = {file.name: file.stat() for file in sorted(path.iterdir()) if file.is_file()}
    return {"path": str(path), "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def notes(command: Run) -> list[str]:
    """What was left out."""
    left_out = []
    if not command.evaluation:
        left_out.append("Not decontaminated: --evaluation names no set.")
    if not command.difficulty.model:
        left_out.append("No pass rates: --difficulty.model names no checkpoint.")
    return left_out


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """A progress bar."""
    with terminal.progress() as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


def explain(command: Explain) -> None:
    decision = read_decision(command.output, command.row)
    print(f"row {decision['row']}, {decision['place']}: {decision['outcome']}")
    for line in decision["trail"]:
        print(f"  {line}")
    print(f"question: {decision['question']}\nanswer: {decision['answer']}")


def synthesize(command: Synthesize) -> None:
    if command.output.suffix != ".jsonl":
        raise ValueError(f"--output {command.output} must end in .jsonl, the form that is written")
    if command.num_problems < 1:
        raise ValueError(f"--num-problems {command.num_problems} is not at least 1")
    made = make(command.task, level=command.level, num_problems=command.num_problems, seed=command.seed)
    with bar(command.task, command.num_problems) as advance:
        lines = []
        for problem in made:
            lines.append(json.dumps({"question": problem.question, "answer": problem.answer}) + "\n")
            advance(1)
    command.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(command.output) as file:
        file.write("".join(lines).encode())
    print(f"{len(lines):,} problems in {command.output}")


if __name__ == "__main__":
    main()
