"""From items to records, interrupted and not, with a fleet whose responses are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.evaluation import run
from megatron_orz.evaluation.benchmark import Benchmark, load_benchmark
from megatron_orz.evaluation.records import ItemRecord, RecordFile
from megatron_orz.evaluation.run import answer_items
from megatron_orz.evaluation.summary import summarise
from megatron_orz.ranks import Ranks
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import Prompt, Rollout

NUM_ITEMS, NUM_RESPONSES = 7, 4
TOKENIZER = build_tokenizer()


class SeededFleet:
    """Answers from (seed, place of the prompt, sibling), as a real fleet does: right in two forms, wrong, or none."""

    def __init__(self, *, fail_at_call: int | None = None) -> None:
        self.asked: list[int] = []
        self._fail_at_call = fail_at_call
        self._num_calls = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        if self._num_calls == self._fail_at_call:
            raise RuntimeError("the server died")
        self._num_calls += 1
        self.asked += [prompt.prompt_id for prompt in prompts]
        rollouts = []
        for place, prompt in enumerate(prompts):
            for sibling in range(num_responses):
                style = (seed + 3 * place + 5 * sibling) % 4
                answer = int(prompt.answer)
                boxed = (str(answer), f"{answer}.0", str(answer + 1), "")[style]
                text = f"<answer>\\boxed{{{boxed}}}</answer>" if boxed else "1+1"
                ids = TOKENIZER(text)["input_ids"]
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        response_ids=ids,
                        rollout_log_probs=[0.0] * len(ids),
                        finish_reason="stop" if sibling else "length",
                        policy_version=0,
                    )
                )
                if on_rollout is not None:
                    on_rollout()
        return rollouts


@pytest.fixture(scope="module")
def verifier():
    with AnswerVerifier(timeout_s=120.0, num_workers=1) as verifier:
        yield verifier


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    monkeypatch.setattr(run, "CHUNK_ITEMS", 3)
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"question": "{n}+0", "answer": "{n}"}}\n' for n in range(NUM_ITEMS)))
    return load_benchmark(path, TOKENIZER, template="short", max_prompt_tokens=64)


def evaluate(
    benchmark: Benchmark, verifier: AnswerVerifier, fleet: SeededFleet, path: Path, calls: list[int] | None = None
) -> list[ItemRecord]:
    advance = [] if calls is None else calls
    with RecordFile(path) as records:
        return answer_items(
            benchmark,
            fleet.generate,
            ResponseGrader(verifier, TOKENIZER, Ranks()),
            verifier,
            TOKENIZER.decode,
            records,
            num_responses=NUM_RESPONSES,
            seed=1,
            on_response=lambda: advance.append(1),
        )


def test_records_say_what_was_answered_and_how_it_was_graded(
    benchmark: Benchmark, verifier: AnswerVerifier, tmp_path: Path
) -> None:
    calls: list[int] = []
    records = evaluate(benchmark, verifier, SeededFleet(), tmp_path / "r.jsonl", calls)
    assert len(calls) == NUM_ITEMS * NUM_RESPONSES
    assert [record.problem for record in records] == [f"{n}+0" for n in range(NUM_ITEMS)]
    for number, record in enumerate(records):
        votes = {}
        for sibling, response in enumerate(record.responses):
            assert response.num_tokens == len(TOKENIZER(response.text)["input_ids"])
            value = None if response.extracted is None else float(response.extracted)
            assert response.is_correct == (value == number)
            assert response.reward == float(value == number and sibling != 0)
            assert (response.vote is None) == (value is None)
            assert votes.setdefault(value, response.vote) == response.vote
        assert len(set(votes.values())) == len(votes)
    summary = summarise("sums", records)
    rewards = [response.reward for record in records for response in record.responses]
    assert list(summary.scores) == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert summary.scores["avg@4"].value == pytest.approx(sum(rewards) / len(rewards))
    assert summary.scores["pass@4"].value == pytest.approx(
        sum(any(response.reward for response in record.responses) for record in records) / NUM_ITEMS
    )
    assert summary.truncated_share == 1 / NUM_RESPONSES


@pytest.mark.parametrize("cut", [0, 40])
def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(
    benchmark: Benchmark, verifier: AnswerVerifier, tmp_path: Path, cut: int
) -> None:
    whole = evaluate(benchmark, verifier, SeededFleet(), tmp_path / "whole.jsonl")
    path = tmp_path / "parts.jsonl"
    with pytest.raises(RuntimeError, match="the server died"):
        evaluate(benchmark, verifier, SeededFleet(fail_at_call=1), path)
    assert len(path.read_text().splitlines()) == 3
    if cut:  # the machine went down within the third line
        path.write_bytes(path.read_bytes()[:-cut])
    again, calls = SeededFleet(), []
    assert evaluate(benchmark, verifier, again, path, calls) == whole
    assert again.asked == list(range(0 if cut else 3, NUM_ITEMS))
    assert len(calls) == NUM_ITEMS * NUM_RESPONSES
    assert sorted(path.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())

    finished = SeededFleet()
    assert evaluate(benchmark, verifier, finished, path) == whole
    assert finished.asked == []


def test_programs_are_not_put_to_the_vote_and_their_tests_not_recorded(
    verifier: AnswerVerifier, tmp_path: Path
) -> None:
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"question": "1+1", "tests": [{"input": "", "output": "2"}]}) + "\n")
    code = load_benchmark(path, TOKENIZER, template="short", max_prompt_tokens=1000)

    def generate(prompts: Sequence[Prompt], **_: object) -> list[Rollout]:
        ids = [TOKENIZER("1")["input_ids"], TOKENIZER("2")["input_ids"]]
        fields = {"rollout_log_probs": [0.0], "finish_reason": "stop", "policy_version": 0}
        return [Rollout(prompt=prompts[0], response_ids=response, **fields) for response in ids]  # type: ignore[arg-type]

    with RecordFile(tmp_path / "r.jsonl") as file:
        programs = {tuple(TOKENIZER(str(n))["input_ids"]): f"```python\nprint({n})\n```" for n in (1, 2)}
        tokenizer = SimpleNamespace(decode=lambda ids: programs[tuple(ids)])
        (record,) = answer_items(
            code,
            generate,
            ResponseGrader(verifier, tokenizer, Ranks()),  # type: ignore[arg-type]
            verifier,
            tokenizer.decode,
            file,
            num_responses=2,
            seed=0,
            on_response=lambda: None,
        )
    assert [response.reward for response in record.responses] == [0.0, 1.0]
    assert record.answer == ""
    assert list(summarise("code", [record]).scores) == ["avg@2", "pass@2"]


def test_records_of_two_sizes_have_no_score(benchmark: Benchmark, verifier: AnswerVerifier, tmp_path: Path) -> None:
    first, *_ = evaluate(benchmark, verifier, SeededFleet(), tmp_path / "r.jsonl")
    shorter = ItemRecord(item="x", place="", kind="math", problem="", answer="", responses=first.responses[:1])
    with pytest.raises(ValueError, match="different numbers of responses"):
        summarise("sums", [first, shorter])
