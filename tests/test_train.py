"""A recipe as a user runs it: its command line, and how everything that a user can get wrong ends."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from megatron_orz.config import to_json
from tests.recipe import DEADLINE_S, command_line, run_process, sentence

pytestmark = pytest.mark.usefixtures("own_place")


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
            r"8 rollouts a step cannot be split into 9 mini-batches; raise ppo\.num_prompts, or lower .*",
        ),
        ("--ppo.num-steps 0", r"ppo\.num_steps 0 is not at least 1"),
        ("--checkpoint.keep 0", r"checkpoint\.keep 0 is not at least 1; set checkpoint\.interval to 0 to save none"),
        (
            "--checkpoint.keep-every 15",
            r"checkpoint\.keep_every 15 is not a multiple of .*interval 10, .*; make it one",
        ),
        ("--policy.optimizer.lr 0", r"lr 0\.0 is not positive"),
        ("--policy.optimizer.eps 0", r"eps 0\.0 is not positive"),
        ("--critic.optimizer.weight-decay -0.1", r"weight_decay -0\.1 is negative; 0 turns it off"),
        ("--evaluation.max-prompts 0", r"evaluation\.max_prompts 0 is not at least 1; leave it out for all prompts"),
        ("--seed -1", r"seed -1 is negative; set it to 0 or more"),
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
