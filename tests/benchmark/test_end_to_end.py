"""The benchmark of the whole loop: that everything does the same work; not how fast anything is."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_orz.benchmark import countdown, end_to_end, summary
from megatron_orz.benchmark.countdown_work import StepTimes, Work
from megatron_orz.benchmark.end_to_end import Arguments, checked

TINY = Arguments(
    num_prompts=4, num_responses=4, response_tokens=6, longest=32, prompt_tokens=3, trl_rows=8, num_steps=2
)


def test_responses_are_as_long_as_their_prompts_say_and_answers_are_sampled(tmp_path: Path) -> None:
    countdown.save_model(tmp_path)
    lengths = [2, 7, 40]
    countdown.write_prompts(tmp_path / "prompts.jsonl", lengths, prompt_tokens=5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.num_parameters() / 1e6 == pytest.approx(0.43, abs=0.005)
    torch.manual_seed(0)
    for length, line in zip(lengths, (tmp_path / "prompts.jsonl").read_text().splitlines(), strict=True):
        prompt = tokenizer(json.loads(line)["question"], return_tensors="pt").input_ids
        assert prompt.shape == (1, 5)
        responses = model.generate(prompt.repeat(32, 1), do_sample=True, top_k=0, max_new_tokens=60)[:, 5:]
        assert responses.shape == (32, length)
        assert (responses[:, -1] == tokenizer.eos_token_id).all()
        answers = {tokenizer.decode(response[-2:-1]) for response in responses}
        assert answers == {r"<answer>\boxed{0}</answer>", r"<answer>\boxed{1}</answer>"}


@pytest.mark.slow
def test_ours_and_trl_do_the_same_work(tmp_path: Path) -> None:
    written = io.StringIO()
    arguments = replace(TINY, contenders=("ours", "trl", "critic"), output=tmp_path / "loop.json")
    results = json.loads(end_to_end.run(arguments, Console(file=written, width=140)).read_text())
    equal, long_tailed = results["groups"]
    assert equal["num_response_tokens"] == 4 * 4 * 6
    assert long_tailed["num_response_tokens"] == 4 * sum(arguments.response_lengths("long-tailed"))
    for group in results["groups"]:
        assert list(group["rows"]) == ["megatron_orz", "TRL", "megatron_orz, with a critic"]
        for row in group["rows"].values():
            assert len(row["times_s"]) == 1
            assert row["samples_per_s"] == pytest.approx(16 / row["median_s"])
        metrics = group["rows"]["megatron_orz, with a critic"]["metrics"]
        for phase in ("generate", "infer", "critic", "policy"):
            assert metrics[f"perf/{phase}_mfu"] > 0
            assert metrics[f"perf/{phase}_tokens_per_s_per_gpu"] > 0
    assert "target, at least 2 times as fast as TRL" in written.getvalue()


def test_what_fails_is_named_and_the_rest_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def steps(contender: str, work: Work, timeout_s: float) -> StepTimes:
        if contender == "trl":
            raise RuntimeError("TRL failed: no such package\nand a long trace")
        metrics = [{"time/policy_s": 0.25, "perf/mfu": 0.5}, {"time/policy_s": 0.75, "perf/mfu": 0.25}]
        if contender == "critic":
            metrics[1] |= {"memory/policy_peak_gib": 0.25, "memory/policy_weights_gib": 2e-3}
            metrics[1] |= {"memory/critic_weights_gib": 1e-3}
        return StepTimes(
            seconds=[9.0, 2.0], num_response_tokens=[96, 96], rewards=[0.5, 0.5], peak_bytes=300 << 20, metrics=metrics
        )

    monkeypatch.setattr(end_to_end, "in_process_of_its_own", steps)
    written = io.StringIO()
    path = tmp_path / "loop.json"
    arguments = replace(TINY, only=("equal",), contenders=("ours", "trl", "critic"), output=path)
    (group,) = json.loads(end_to_end.run(arguments, Console(file=written, width=200)).read_text())["groups"]
    assert "TRL is missing: TRL failed: no such package" in written.getvalue()
    assert "target, at least 1.2 times as fast as TRL: not measured" in written.getvalue()
    (row,) = [line for line in written.getvalue().splitlines() if "with a critic" in line and " 300 " in line]
    assert [cell for cell in re.split("[ │]+", row) if cell][-3:] == ["300", "256", "3.1"]
    (line,) = [line for line in summary.rows(path) if "with a critic" in line]
    assert "| 8 samples/s | megatron_orz: 8 samples/s | 1.00 |" in line
    ours = group["rows"]["megatron_orz"]
    assert (ours["times_s"], ours["samples_per_s"], ours["warm_up_s"]) == ([2.0], 8.0, [9.0])
    assert ours["metrics"] == {"time/policy_s": 0.75, "perf/mfu": 0.25}
    monkeypatch.setattr(end_to_end, "in_process_of_its_own", lambda contender, *others: steps("trl", *others))
    with pytest.raises(RuntimeError, match="no such package"):
        end_to_end.run(arguments, Console(file=io.StringIO()))


def test_a_run_that_did_other_work_is_refused(tmp_path: Path) -> None:
    work = Work(
        folder=tmp_path,
        response_lengths=(2, 5),
        num_responses=3,
        num_steps=2,
        prompt_tokens=4,
        max_pack_tokens=64,
        trl_rows=2,
    )
    good = StepTimes(seconds=[1.0, 1.0], num_response_tokens=[21, 21], rewards=[0.5, 0.4], peak_bytes=1)
    assert checked("it", good, work) is good
    with pytest.raises(RuntimeError, match="not 21 in each"):
        checked("it", replace(good, num_response_tokens=[21, 20]), work)
    with pytest.raises(RuntimeError, match=r"mean reward is 0\.00"):
        checked("it", replace(good, rewards=[0.0, 0.0]), work)


def test_the_longest_of_long_tailed_lengths_is_sixteen_medians() -> None:
    lengths = sorted(Arguments().response_lengths("long-tailed"))
    assert lengths[-1] == 256
    assert (lengths[31] + lengths[32]) / 2 == pytest.approx(16, abs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 1}, "give at least 2"),
        ({"longest": 1000}, "counts down from 2 to 543"),
        ({"num_responses": 1}, "compares the responses"),
        ({"trl_rows": 5}, "trl_rows 5 does not divide the 16 rollouts"),
        ({"contenders": ("trl",)}, "lacks ours"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
