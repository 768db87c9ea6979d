"""A recipe as a user runs it: what a run leaves behind, and how everything that a user can get wrong ends."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_orz import ppo
from megatron_orz.config import to_json
from megatron_orz.conversion.convert import plan_hf_to_megatron, plan_megatron_to_hf
from megatron_orz.data.synthetic import ArithmeticTask, build_tokenizer, make_problems, write_problems
from megatron_orz.logs import read_metrics
from megatron_orz.rollout.servers import free_port
from megatron_orz.types import Metrics
from tests.conversion.checkpoints import assert_same_tensors
from tests.disks import small_disk
from tests.engine import tiny

DEADLINE_S = 180

RECIPE = """
from pathlib import Path

from megatron_orz import train
from megatron_orz.config import (
    Config, CriticConfig, DataConfig, EvaluationConfig, FleetConfig, ModelConfig, OptimizerConfig, PPOConfig,
    SamplingConfig,
)

HERE = Path(__file__).parent
RECIPE = Config(
    run_dir=Path("run"),
    policy=ModelConfig(path=HERE / "model", optimizer=OptimizerConfig(lr=1e-3)),
    critic=CriticConfig(path=HERE / "model", optimizer=OptimizerConfig(lr=1e-3)),
    ppo=PPOConfig(num_steps=2, num_prompts=4, num_responses=2, num_critic_updates=2),
    sampling=SamplingConfig(max_response_tokens=16),
    data=DataConfig(train=(HERE / "train.jsonl",), template="short", max_prompt_tokens=48, max_pack_tokens=128),
    fleet=FleetConfig(kind="local", max_model_tokens=64),
    evaluation=EvaluationConfig(data=(HERE / "held_out.jsonl",), num_responses=2),
)

if __name__ == "__main__":
    train.main(RECIPE)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, with a model and data, and what is wrong with other models and data."""
    home = tmp_path_factory.mktemp("home")
    (home / "recipe.py").write_text(RECIPE)
    tokenizer = build_tokenizer()
    tiny.save_model(home / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(home / "model")
    train, held_out = make_problems(ArithmeticTask(), num_train=30, num_held_out=4, seed=0)
    write_problems(home / "train.jsonl", train)
    write_problems(home / "held_out.jsonl", held_out)

    for name in ("no_tokenizer", "no_weights", "damaged_tokenizer", "other_tokenizer", "gpt2"):
        shutil.copytree(home / "model", home / name)
    for file in (home / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    (home / "no_weights" / "model.safetensors").unlink()
    plan_hf_to_megatron(home / "model", home / "megatron").run(lambda _: None)
    (home / "damaged_tokenizer" / "tokenizer.json").write_text("{}")
    other = json.loads((home / "model" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (home / "other_tokenizer" / "tokenizer.json").write_text(json.dumps(other))
    (home / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    tiny.save_model(home / "small_vocabulary")
    tokenizer.save_pretrained(home / "small_vocabulary")
    (home / "empty.jsonl").write_text("\n")
    (home / "malformed.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "ans\n')
    (home / "columns.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (home / "again").mkdir()
    shutil.copy(home / "held_out.jsonl", home / "again")
    return home


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """An empty working directory, and no process left at the end."""
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children(recursive=True)
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


def command_line(home: Path, *arguments: str) -> int:
    """Runs the recipe with these arguments, in this process. Returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe.py", *(argument.format(home=home) for argument in arguments)])
        try:
            runpy.run_path(str(home / "recipe.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def sentence(stderr: str) -> str:
    """The one thing that stderr says, in our line or in tyro's box."""
    text = " ".join(re.sub("[─│╭╮╰╯]", " ", stderr).split())
    said = re.fullmatch(
        r"(?:error(?: on rank \d)?:|Value error Error parsing \S+:) (.*?)( ?For full helptext, see \S+ --help)?", text
    )
    assert said, stderr
    return said[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--deterministic --fleet.kind vllm",
            r"deterministic needs fleet\.kind local, not vllm: .*; set fleet\.kind, .*",
        ),
        ("--hang-timeout-s 500", r"hang_timeout_s 500 is not above parallel\.timeout_s 600, .*; raise hang_timeout_s"),
        ("--policy.optimizer.lr inf", r"policy\.optimizer\.lr inf is not a finite number"),
        ("--fleet.port 99999", r"fleet\.port 99999 is no port; 0 picks a free one"),
        ("--parallel.tp 2", r"world size 1 is not a multiple of tp\*pp\*cp = 2\*1\*1; set parallel\.tp, .*"),
        ("--policy.path {home}/gpt2", r"\S+config\.json: model_type 'gpt2' is not one of llama, mistral, .*"),
        ("--critic.path {home}/none", r"\S+none holds no config\.json; .* must be a Hugging Face checkpoint directory"),
        ("--policy.path {home}/no_weights", r"\S+no_weights holds no \.safetensors file; save the checkpoint as .*"),
        ("--policy.path {home}/megatron", r"\S+megatron holds no \.safetensors file; save the checkpoint as .*"),
        ("--policy.path {home}/no_tokenizer", r"\S+no_tokenizer holds no tokenizer; copy the tokenizer's files .*"),
        ("--critic.path {home}/damaged_tokenizer", r"\S+damaged_tokenizer holds no tokenizer that .*; copy the .*"),
        ("--critic.path {home}/other_tokenizer", r"\S+other_tokenizer has another vocabulary .*; set critic\.path .*"),
        ("--policy.path {home}/small_vocabulary", r".* token id 263 is not below .* size 131; use the tokenizer .*"),
        ("--data.train {home}/none.jsonl", r"\S+none\.jsonl: no such file; check data\.train and evaluation\.data"),
        ("--data.train {home}/empty.jsonl", r"\S+empty\.jsonl: holds no problems; remove it .*"),
        ("--data.train {home}/malformed.jsonl", r"\S+malformed\.jsonl: line 2: malformed JSON .*; correct it .*"),
        (
            "--data.train {home}/columns.jsonl",
            r"\S+: line 1: has no column 'question', .*; set data\.problem_column .*",
        ),
        (
            "--data.max-prompt-tokens 2",
            r"none of the \d+ rows of .* max_prompt_tokens 2; raise data\.max_prompt_tokens",
        ),
        (
            "--evaluation.data {home}/held_out.jsonl {home}/again/held_out.jsonl",
            r"evaluation\.data holds two files named held_out, .*; rename one",
        ),
        ("--data.template sum", r"template 'sum' is neither a built-in name .*; set data\.template to one of them"),
        ("--fleet.max-model-tokens 1024", r"fleet\.max_model_tokens 1024 exceeds the 512 positions of .*; lower it"),
        (
            "--sampling.max-response-tokens 17",
            r"a prompt of 48 tokens and a response of 17 exceed fleet\.max_model_tokens 64; raise it, or lower .*",
        ),
        (
            "--data.max-pack-tokens 63",
            r"a prompt of 48 tokens and a response of 16 do not fit data\.max_pack_tokens 63; raise it to at least 64",
        ),
        (
            "--ppo.num-critic-updates 9",
            r"8 rollouts a step cannot be split into 9 mini-batches; raise ppo\.num_prompts or lower .*",
        ),
        ("--ppo.num-steps 0", r"ppo\.num_steps 0 is not at least 1"),
        ("--checkpoint.keep 0", r"checkpoint\.keep 0 < 1; set checkpoint\.interval 0 to save none"),
        (
            "--checkpoint.keep-every 15",
            r"checkpoint\.keep_every 15 is not a multiple of .*interval 10, .*; make it one",
        ),
        ("--policy.optimizer.lr 0", r"lr 0\.0 is not positive"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    home: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, expected: str
) -> None:
    assert command_line(home, *arguments.split()) == 2
    said = capfd.readouterr()
    assert re.fullmatch(expected, sentence(said.err)), said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("world_size", "arguments", "expected"),
    [
        (
            3,
            "--parallel.tp 2",
            r"world size 3 is not a multiple of tp\*pp\*cp = 2\*1\*1; set parallel\.tp, .*",
        ),
        (3, "--parallel.tp 3", r"parallel\.tp 3 does not divide the model's 4 attention heads; choose a tp .*"),
        (4, "--parallel.tp 4", r"parallel\.tp 4 does not divide the model's 2 key-value heads; choose a tp .*"),
        (5, "--parallel.pp 5", r"the model's 4 layers cannot fill pp\*vpp = 5\*1 chunks; lower parallel\.pp or .*"),
        (2, "--ppo.num-steps 0", r"ppo\.num_steps 0 is not at least 1"),
        (
            3,
            "--parallel.tp 3 --parallel.sequence-parallel --data.max-pack-tokens 65",
            r"a prompt of 48 .* of 16 do not fit data\.max_pack_tokens 65; raise it to at least 66",
        ),
    ],
)
def test_rank_0_alone_says_what_is_wrong_with_the_config(
    home: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    arguments: str,
    expected: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert command_line(home, *arguments.split()) == 2
        said = capfd.readouterr().err
        assert re.fullmatch(expected, sentence(said)) if rank == 0 else said == ""


@pytest.mark.parametrize("run_dir", ["{home}/train.jsonl", "{home}/train.jsonl/run"])
def test_a_run_directory_that_cannot_be_made_is_named(
    home: Path, capfd: pytest.CaptureFixture[str], run_dir: str
) -> None:
    before = (home / "train.jsonl").read_bytes()
    assert command_line(home, "--run-dir", run_dir) == 2
    expected = rf"cannot write {run_dir.format(home=home)}: .*; free some space or set run_dir to a directory that .*"
    assert re.fullmatch(expected, sentence(capfd.readouterr().err))
    assert (home / "train.jsonl").read_bytes() == before


def test_help_lists_every_option_with_its_default(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line(home, "--help") == 0
    said = " ".join(capfd.readouterr().out.split())
    for option in (
        "--ppo.num-steps INT",
        "--sampling.temperature FLOAT",
        "--fleet.kind {vllm,sglang,local}",
        "--run-dir PATH",
    ):
        assert option in said
    assert "PPO iterations: rollouts, then updates. (default: 2)" in said


def run_process(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The recipe as a process of its own, as from a shell."""
    return subprocess.Popen(
        [sys.executable, str(home / "recipe.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
    )


def test_dry_run_prints_the_resolved_config_and_builds_nothing(home: Path, tmp_path: Path) -> None:
    process = run_process(home, "--dry-run", "--ppo.num-steps", "7", "--data.template", "{problem}=")
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    expected = json.loads(to_json(runpy.run_path(str(home / "recipe.py"))["RECIPE"]))
    expected["dry_run"], expected["ppo"]["num_steps"], expected["data"]["template"] = True, 7, "{problem}="
    assert json.loads(out) == expected
    assert "30 prompts of 30 rows (0 too long)" in err
    assert list(tmp_path.iterdir()) == []


def test_a_critic_may_come_from_a_megatron_checkpoint(home: Path) -> None:
    assert command_line(home, "--dry-run", "--critic.path", "{home}/megatron") == 0


def test_an_error_in_a_process_is_one_line_and_exit_code_2(home: Path, tmp_path: Path) -> None:
    process = run_process(home, "--data.train", "none.jsonl")
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (2, "")
    assert err == "error: none.jsonl: no such file; check data.train and evaluation.data\n"
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Finished:
    """A run of two steps, done twice in the same place."""

    place: Path
    out: str
    weights: dict[str, Tensor]
    """The policy's, after the last step of the second run."""

    @property
    def run_dir(self) -> Path:
        return self.place / "run"


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    place = tmp_path_factory.mktemp("finished")
    weights: dict[str, Tensor] = {}
    run = ppo.run

    def run_and_keep_weights(*args: Any, **options: Any) -> None:
        run(*args, **options)
        weights.update((name, weight.clone()) for name, weight in options["policy"].hf_weights())

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert command_line(home) == 0
        patch.setattr(ppo, "run", run_and_keep_weights)
        out = place / "out"
        with out.open("w") as file:
            patch.setattr(sys, "stdout", file)
            assert command_line(home, "--fresh") == 0
    return Finished(place=place, out=out.read_text(), weights=weights)


def without_times(run_dir: Path) -> list[Metrics]:
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "perf/")) and name != "tokens_per_s"
        }
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_a_run_leaves_its_files_and_no_others(home: Path, finished: Finished) -> None:
    names = {path.name for path in finished.run_dir.iterdir()}
    files = {"config.json", "curves.png", "final", "metrics.jsonl", "tensorboard"}
    assert names == files | {"checkpoints", "final-critic", "finished", "generations", ".lock"}
    assert {path.name for path in (finished.run_dir / "checkpoints").iterdir()} == {"step-00000002", "latest"}
    config = runpy.run_path(str(home / "recipe.py"))["RECIPE"]
    assert (finished.run_dir / "config.json").read_text() == to_json(replace(config, fresh=True))
    with Image.open(finished.run_dir / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20, "the picture is blank"


def test_tensorboard_holds_what_metrics_jsonl_holds(finished: Finished) -> None:
    rows = read_metrics(finished.run_dir / "metrics.jsonl")
    events = EventAccumulator(str(finished.run_dir / "tensorboard")).Reload()
    assert [row["step"] for row in rows] == [0, 1, 2]
    for metric in ("reward/mean", "policy/grad_norm", "critic/loss", "evaluation/held_out/avg@2"):
        assert [(event.step, event.value) for event in events.Scalars(metric)] == [
            (row["step"], pytest.approx(row[metric])) for row in rows if metric in row
        ]


def test_transformers_loads_the_final_checkpoint_with_exactly_the_trained_weights(
    home: Path, finished: Finished
) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.run_dir / "final")
    base = AutoModelForCausalLM.from_pretrained(home / "model").state_dict()
    assert model.state_dict().keys() == finished.weights.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, finished.weights[name]), name
        assert not torch.equal(weight, base[name]), f"{name} is not trained"
    tokenizer = AutoTokenizer.from_pretrained(finished.run_dir / "final")
    assert tokenizer("User: 1+2\n<think>")["input_ids"] == build_tokenizer()("User: 1+2\n<think>")["input_ids"]


def test_a_fresh_run_moves_the_first_aside_and_repeats_it(finished: Finished) -> None:
    assert "the run that was in run is now in run-1" in finished.out
    first, second = (without_times(finished.place / name) for name in ("run-1", "run"))
    assert len(first) == 3
    # As text, because nan, which the critic explains of rewards that are all the same, is not equal to itself.
    assert json.dumps(second) == json.dumps(first)
    assert (finished.place / "run-1" / "final").is_dir()


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_same_command_again_finds_nothing_to_do(
    home: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.place)
    before = files_of(finished.run_dir)
    assert command_line(home) == 0
    assert "run holds this run, finished; raise ppo.num_steps or begin anew with --fresh" in capfd.readouterr().out
    assert files_of(finished.run_dir) == before


def test_checkpoints_and_exports_hold_the_final_weights(home: Path, tmp_path: Path) -> None:
    assert command_line(home, "--checkpoint.export-interval", "2") == 0
    plan_megatron_to_hf(tmp_path / "run" / "checkpoints" / "latest" / "policy", tmp_path / "converted").run(
        lambda _: None
    )
    assert [path.name for path in (tmp_path / "run" / "exports").iterdir()] == ["step-00000002"]
    for path in (tmp_path / "run" / "exports" / "step-00000002", tmp_path / "converted"):
        assert_same_tensors(tmp_path / "run" / "final", path)


def test_a_finished_run_goes_on_with_more_steps(home: Path, tmp_path: Path) -> None:
    assert command_line(home) == 0
    assert command_line(home, "--ppo.num-steps", "3") == 0
    assert command_line(home, "--ppo.num-steps", "3", "--run-dir", "whole") == 0
    longer, whole = (without_times(tmp_path / name) for name in ("run", "whole"))
    assert json.dumps(longer) == json.dumps(whole)
    final = "final/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--policy.optimizer.lr 2e-3",
            r"run holds a run of another recipe: policy\.optimizer\.lr is 0\.002, was 0\.001; restore the recipe, .*",
        ),
        ("--ppo.num-steps 1", r"run holds a run of 2 steps, more than ppo\.num_steps 1; raise it, .*--fresh"),
    ],
)
def test_a_run_does_not_go_on_as_another(
    home: Path,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: str,
    expected: str,
) -> None:
    monkeypatch.chdir(finished.place)
    before = files_of(finished.run_dir)
    assert command_line(home, *arguments.split()) == 2
    assert re.fullmatch(expected, sentence(capfd.readouterr().err))
    assert files_of(finished.run_dir) == before


def test_a_directory_in_use_by_a_live_run_is_left_alone(
    home: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.place)
    before = files_of(finished.run_dir)
    with FileLock(finished.run_dir / ".lock"):
        assert command_line(home, "--fresh") == 2
    expected = r"run is in use by a live run; wait for it, or set run_dir"
    assert re.fullmatch(expected, sentence(capfd.readouterr().err))
    assert files_of(finished.run_dir) == before


def test_a_deterministic_run_repeats_bit_by_bit(home: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    try:
        for run in runs:
            torch.manual_seed(len(str(run)))  # a run does not depend on what went before
            assert command_line(home, "--deterministic", "--run-dir", str(run)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = runs
    assert_same_bits(first, second)


def assert_same_bits(first: Path, second: Path) -> None:
    """The same weights, and the same metrics of every step, except for those that measure time."""
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    rows = [read_metrics(run / "metrics.jsonl") for run in (first, second)]
    measured = [
        [
            {name: x for name, x in row.items() if not name.startswith(("time/", "perf/", "tokens_per_s"))}
            for row in of_run
        ]
        for of_run in rows
    ]
    assert len(measured[0]) == 3
    assert measured[0] == measured[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--parallel.tp", "2")])
def test_deterministic_ranks_repeat_bit_by_bit(home: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    for run in runs:
        grid = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = ("--deterministic", "--run-dir", str(run), *layout)
        ranks = [run_process(home, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **grid) for rank in range(2)]
        try:
            said = [rank.communicate(timeout=2 * DEADLINE_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], said
    assert_same_bits(*runs)


def test_another_seed_gives_another_run(home: Path, finished: Finished, tmp_path: Path) -> None:
    assert command_line(home, "--seed", "1", "--ppo.num-steps", "1") == 0
    first, other = without_times(finished.run_dir)[0], without_times(tmp_path / "run")[0]
    assert first["response/length_mean"] != other["response/length_mean"]
    assert first["policy/entropy"] != other["policy/entropy"]


def test_the_console_shows_a_line_a_step_and_the_comparison(finished: Finished) -> None:
    steps = [line for line in finished.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["0/2", "1/2", "2/2"]
    assert re.search(r"held_out/avg@2 +\d+\.\d % +\d+\.\d % +[+-]\d+\.\d pp", finished.out)


@pytest.mark.parametrize("kib", [4, 8, 200])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kib: int
) -> None:
    """The disk fills with the config, with the first metrics, or with the final checkpoint."""
    with small_disk(tmp_path / "disk", "-o", f"size={kib}k") as disk:
        assert command_line(home, "--run-dir", str(disk / "run"), "--checkpoint.interval", "0") == 2
        said = capfd.readouterr().err
        remedy = "change run_dir" if kib == 200 else "set run_dir to a directory that can be written"
        expected = rf"cannot write .*{disk}/run.*: .*No space left on device.*; free some space or {remedy}"
        assert re.fullmatch(expected, sentence(said.splitlines()[-1]))
        assert "Traceback" not in said
        assert not list(disk.rglob("*final*"))
        assert not list(disk.rglob("*.tmp"))
        assert (disk / "run" / "metrics.jsonl").read_bytes()[-1:] in (b"", b"\n")


def test_a_disk_too_small_for_a_second_checkpoint_keeps_the_first(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "-o", "size=7000k") as disk:
        at_every_step = ("--run-dir", str(disk / "run"), "--checkpoint.interval", "1", "--ppo.num-steps", "3")
        at_every_step += ("--generations.interval", "0", "--checkpoint.no-asynchronous")
        for _ in range(2):
            assert command_line(home, *at_every_step) == 2
            expected = (
                r"cannot write the checkpoint of step 2 \(.*No space left on device.*it goes on from step-00000001"
            )
            assert re.fullmatch(expected, sentence(capfd.readouterr().err.splitlines()[-1]))
        assert command_line(home, *at_every_step, "--checkpoint.interval", "0") == 0
        assert command_line(home, "--ppo.num-steps", "3", "--generations.interval", "0") == 0
        assert json.dumps(without_times(disk / "run")) == json.dumps(without_times(tmp_path / "run"))


def test_a_disk_too_small_for_the_curves_keeps_the_checkpoint(
    home: Path, tmp_path: Path, finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = finished.run_dir / "checkpoints"
    files = [file for file in finished.run_dir.rglob("*") if file.is_file() and checkpoints not in file.parents]
    pages = sum(-(-file.stat().st_size // 4096) for file in files)
    picture = (finished.run_dir / "curves.png").stat().st_size // 1024
    with small_disk(tmp_path / "disk", "-o", f"size={4 * pages - picture // 2}k") as disk:
        assert command_line(home, "--run-dir", str(disk / "run"), "--checkpoint.interval", "0") == 2
        said = capfd.readouterr().err
        expected = r"cannot write \S+curves\.png: No space left on device; free some space and run tools/plot\.py \S+"
        assert re.fullmatch(expected, sentence(said.splitlines()[-1]))
        assert "Traceback" not in said
        assert (disk / "run" / "final" / "model.safetensors").exists()
        assert not (disk / "run" / "curves.png").exists()


def test_two_ranks_end_together_when_one_cannot_write(home: Path, tmp_path: Path) -> None:
    """Rank 0 runs out of disk in the midst of the weights, which both ranks have to gather."""
    with small_disk(tmp_path / "disk", "-o", "size=200k") as disk:
        grid = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = ("--run-dir", str(disk / "run"), "--parallel.tp", "2", "--ppo.num-steps", "1")
        arguments += ("--checkpoint.interval", "0")
        ranks = [run_process(home, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **grid) for rank in range(2)]
        try:
            said = [rank.communicate(timeout=DEADLINE_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [2, 2], said
        last = said[0].splitlines()[-1]
        assert re.match(r"error on rank 0: cannot write the checkpoint \S+final: .*; free some space", last)
        assert "error" not in said[1]
        assert "Traceback" not in said[0] + said[1]
        assert not list(disk.rglob("*final*"))
