"""Which runs a comparison takes, and whether they can be made: found out before the first of them starts."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_orz.ablation.sets import SETS
from megatron_orz.checkpoint.recipe import differences, leaves, recipe_of
from megatron_orz.checkpoint.run_directory import FINISHED_FILE
from megatron_orz.checks import check_models, read_data
from megatron_orz.command_line import parse
from megatron_orz.config import Config, DataConfig, EvaluationConfig
from megatron_orz.json_file import parse_json
from megatron_orz.logs import METRICS_FILE
from megatron_orz.trackers import check_trackers

BASELINE = "baseline"
"""Name of the runs of the recipe as it is."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a variant with one seed. Its directory is an ordinary run directory."""

    name: str
    """Of the variant's runs, whatever their seeds."""
    seed: int
    options: tuple[str, ...]
    """What follows the recipe's file on the command line."""
    config: Config

    @property
    def full_name(self) -> str:
        """Of this run, which its directory is named after."""
        return f"{self.name}-seed{self.seed}"

    @property
    def metrics_path(self) -> Path:
        return self.config.run_dir / METRICS_FILE

    @property
    def is_finished(self) -> bool:
        """Whether all its steps are done and its final checkpoint is there."""
        file = self.config.run_dir / FINISHED_FILE
        return file.exists() and file.read_text().strip() == str(self.config.ppo.num_steps)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs of some sets, each of them once."""

    runs: Sequence[Run]
    """In the order they are made: set by set, and in a set seed by seed."""
    sets: Mapping[str, Mapping[str, str]]
    """Set -> variant -> name of its runs. The first of a set is the recipe as it is."""
    score: str
    """Metric of the held-out score: avg@k of the first held-out file."""

    def of(self, name: str) -> list[Run]:
        """The runs of this name, by seed."""
        return sorted((run for run in self.runs if run.name == name), key=lambda run: run.seed)


def make_plan(
    recipe: Config, *, sets: Sequence[str], seeds: Sequence[int], output: Path, options: Sequence[str]
) -> Plan:
    """The runs of these sets. Variants whose configs are equal share their runs.

    options: of the recipe's command line, for every run; a variant's own come after them. Where the recipe names no
    reference for a penalty, it is the model the policy starts from.

    Raises ValueError for what no run can be made of; what is wrong with an option itself ends as on any command line.
    """
    if not sets or len(set(sets)) < len(sets):
        raise ValueError(f"--sets {' '.join(sets)} names none, or one twice; choose among {', '.join(SETS)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))} names none, or one twice; give different ones")
    common = tuple(options)
    if parse(recipe, common).kl.reference is None:
        common += ("--kl.reference", str(parse(recipe, common).policy.path))
    base = parse(recipe, common)
    if not base.evaluation.data:
        raise ValueError("the recipe has no evaluation.data, so that no held-out score compares its variants; set it")
    for name in ("dry_run", "debug", "fresh"):
        if getattr(base, name):
            raise ValueError(f"--{name.replace('_', '-')} belongs to a single run; leave it out")
    names = {base: BASELINE}
    variants: dict[str, dict[str, str]] = {}
    runs: dict[tuple[str, int], Run] = {}
    for set_name in sets:
        variants[set_name] = {}
        texts = SETS[set_name].variants
        given = {variant: _parse(base, f"{set_name} {variant}", text) for variant, text in texts.items()}
        if base not in given.values():
            given = {BASELINE: base} | given
        for variant, config in sorted(given.items(), key=lambda item: item[1] != base):
            variants[set_name][variant] = names.setdefault(config, f"{set_name}-{variant}")
        for seed in seeds:
            for variant, name in variants[set_name].items():
                changes = shlex.split(texts[variant]) if name != BASELINE else []
                runs.setdefault((name, seed), _run(given[variant], name, seed, output, (*common, *changes)))
    score = f"evaluation/{base.evaluation.data[0].stem}/avg@{base.evaluation.num_responses}"
    return Plan(runs=tuple(runs.values()), sets=variants, score=score)


def check(plan: Plan, *, num_ranks: int) -> None:
    """Checks models, data and directories of all runs. Raises ValueError, saying of which."""
    names_checked: set[str] = set()
    data_checked: set[tuple[DataConfig, EvaluationConfig]] = set()
    for run in plan.runs:
        if run.name in names_checked:  # seeds make no difference
            continue
        with _told_of(run):
            run.config.parallel.check_world_size(num_ranks)
            check_trackers(run.config.tracking.trackers)
            tokenizer = check_models(run.config)
            if (data := (run.config.data, run.config.evaluation)) not in data_checked:
                read_data(run.config, tokenizer)
                data_checked.add(data)
        names_checked.add(run.name)
    check_directories(plan)


def check_directories(plan: Plan) -> None:
    """Raises ValueError when a run's directory holds one of another recipe. More or fewer steps are no difference."""
    for run in plan.runs:
        file = run.config.run_dir / "config.json"
        if not file.exists():
            continue
        with _told_of(run):
            saved = leaves(parse_json(file.read_bytes(), str(file)))
            if found := differences(recipe_of(run.config, ()), saved):
                raise ValueError(
                    f"{file.parent} holds a run of another recipe: {'; '.join(found)}; set --output, or move it away"
                )


def _run(config: Config, name: str, seed: int, output: Path, options: tuple[str, ...]) -> Run:
    run_dir = output / f"{name}-seed{seed}"
    return Run(
        name=name,
        seed=seed,
        options=(*options, "--seed", str(seed), "--run-dir", str(run_dir)),
        config=replace(config, seed=seed, run_dir=run_dir),
    )


def _parse(base: Config, place: str, options: str) -> Config:
    try:
        return parse(base, shlex.split(options))
    except SystemExit as error:  # what is wrong has been said
        raise ValueError(f"{place} cannot be made of this recipe; leave the set out, or choose another") from error


@contextlib.contextmanager
def _told_of(run: Run) -> Iterator[None]:
    """Begins what is wrong in the body with the run's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{run.full_name}: {error}") from error
