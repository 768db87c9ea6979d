"""Rollouts in, metrics and a file out, the same however many ranks share the work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_orz.config import GenerationsConfig
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.generations import generations_file, read_generations
from megatron_orz.logs import RunDirectoryError, RunLog
from megatron_orz.metrics.recorder import RolloutRecorder
from megatron_orz.metrics.rollouts import rollout_metrics
from megatron_orz.metrics.traits import traits_of
from megatron_orz.ranks import Ranks
from megatron_orz.types import Grade, Metrics, Prompt, Rollout, Swap
from tests.launch import run_ranks

TEXTS = ["1+2=3", "wait, 1+2=3", "1+1+1+1+1+1+1+1", "Retry: 4", "recheck, however, 5"]
REWARDS = [1.0, 1.0, 0.0, 0.0, 1.0]


def make_rollouts() -> list[Rollout]:
    """Five, so that two ranks share them unevenly; prompts of two, two and one response."""
    tokenizer = build_tokenizer()
    return [
        Rollout(
            prompt=Prompt(
                prompt_id=100 + i // 2, token_ids=tokenizer(f"User: {i // 2}")["input_ids"], answer="3", source="sums"
            ),
            response_ids=tokenizer(text)["input_ids"],
            rollout_log_probs=[-1.0] * len(tokenizer(text)["input_ids"]),
            finish_reason="length" if i == 2 else "stop",
            policy_version=6,
            swaps=(Swap(2, 7),) if i == 1 else (),
            grade=Grade(reward=reward, is_correct=reward > 0, is_formatted=i != 2, timed_out=i == 3, extracted=str(i)),
        )
        for i, (text, reward) in enumerate(zip(TEXTS, REWARDS, strict=True))
    ]


def record(run_dir: Path, config: GenerationsConfig, steps: Sequence[int]) -> list[Metrics]:
    """What a run on this rank does; returns the metrics of each step."""
    ranks, tokenizer = Ranks(), build_tokenizer()
    with RunLog(run_dir, num_steps=9, is_main=ranks.rank == 0, console=Console(quiet=True)) as log:
        recorder = RolloutRecorder(config, tokenizer=tokenizer, ranks=ranks, log=log)
        metrics = []
        for step in steps:
            metrics.append(recorder.record(step, make_rollouts()))
            log.record(step, metrics[-1])
    return metrics


def test_metrics_histograms_and_file_are_those_of_the_rollouts(tmp_path: Path) -> None:
    (metrics,) = record(tmp_path, GenerationsConfig(), [7])
    rollouts = make_rollouts()
    traits = traits_of(TEXTS, [rollout.response_ids for rollout in rollouts])
    assert metrics == rollout_metrics(rollouts, traits) | {"generations/left_out": 0}
    assert metrics["response/reflection_share"] == 3 / 5

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for answer, lengths in {"correct": [0, 1, 4], "wrong": [2, 3]}.items():
        (event,) = events.Histograms(f"response/{answer}_length")
        assert event.histogram_value.sum == sum(len(rollouts[i].response_ids) for i in lengths)
        assert event.histogram_value.num == len(lengths)

    rows = list(read_generations(generations_file(tmp_path, 7)))
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        assert (row.step, row.policy_version, row.prompt_id, row.source) == (7, 6, 100 + i // 2, "sums")
        assert (row.prompt, row.response, row.answer, row.extracted) == (f"User: {i // 2}", TEXTS[i], "3", str(i))
        assert (row.prompt_ids, row.response_ids) == (rollout.prompt.token_ids, rollout.response_ids)
        assert (row.num_prompt_tokens, row.num_response_tokens) == (len(row.prompt_ids), len(row.response_ids))
        assert (row.reward, row.is_correct, row.is_formatted) == (REWARDS[i], REWARDS[i] > 0, i != 2)
        assert (row.timed_out, row.finish_reason) == (i == 3, "length" if i == 2 else "stop")
        assert row.swaps == rollout.swaps
        assert tuple(row.reflection) == traits[i].reflection
        assert row.repetition == pytest.approx(traits[i].repetition)


class NoTexts:
    """A tokenizer that fails."""

    def batch_decode(self, token_ids: list[list[int]]) -> list[str]:
        raise LookupError("no texts")


def record_on_a_rank(run_dir: Path) -> None:
    """Both ranks record a step; then one of them fails in the next, and the other learns of it."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (metrics,) = record(run_dir, GenerationsConfig(), [3])
    (run_dir / f"rank-{rank}.json").write_text(json.dumps(metrics))
    with RunLog(run_dir, num_steps=9, is_main=rank == 0, console=Console(quiet=True)) as log:
        tokenizer: Any = build_tokenizer() if rank == 0 else NoTexts()
        recorder = RolloutRecorder(GenerationsConfig(), tokenizer=tokenizer, ranks=Ranks(), log=log)
        error, message = (RuntimeError, "failed on rank 1: .*no texts") if rank == 0 else (LookupError, "no texts")
        with pytest.raises(error, match=message):
            recorder.record(4, make_rollouts())


def test_two_ranks_record_what_one_does(tmp_path: Path) -> None:
    (alone,) = record(tmp_path / "alone", GenerationsConfig(), [3])
    run_ranks(2, record_on_a_rank, tmp_path / "shared")
    first, second = (json.loads((tmp_path / "shared" / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == alone
    assert second == {name: value for name, value in alone.items() if name != "generations/left_out"}
    files = [generations_file(tmp_path / name, 3) for name in ("alone", "shared")]
    assert list(read_generations(files[0])) == list(read_generations(files[1]))


@pytest.mark.parametrize(("interval", "saved"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_files_are_saved_at_the_interval(tmp_path: Path, interval: int, saved: list[int]) -> None:
    steps = record(tmp_path, GenerationsConfig(interval=interval), range(5))
    assert [step for step in range(5) if generations_file(tmp_path, step).exists()] == saved
    assert [step for step, metrics in enumerate(steps) if "generations/left_out" in metrics] == saved


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    (metrics,) = record(tmp_path, GenerationsConfig(max_mib=0.001), [0])
    assert metrics["generations/left_out"] == 5
    assert list(read_generations(generations_file(tmp_path, 0))) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "generations").write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*generations.*; free some space or set run_dir"):
        record(tmp_path, GenerationsConfig(), [0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": -1}, "generations.interval -1 is negative; 0 saves none"),
        ({"max_mib": 0}, "generations.max_mib 0 holds no rollout; set generations.interval to 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationsConfig(**values)
