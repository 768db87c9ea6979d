"""Rollouts in, the same rollouts with their grades out, however many ranks share the work."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from megatron_orz.data.prompts import load_prompts
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.ranks import Ranks
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import FinishReason, Prompt, Rollout
from tests.launch import run_ranks

# Response, how it ended, reference; then the reward, is_correct and is_formatted that it must get.
CASES: list[tuple[tuple[str, FinishReason, str], tuple[float, bool, bool]]] = [
    (("1+2=3</think><answer>\\boxed{3}</answer>", "stop", "3"), (1.0, True, True)),
    (("1+2=4</think><answer>\\boxed{4}</answer>", "stop", "3"), (0.0, False, True)),
    (("</think><answer>\\boxed{\\frac{1}{2}}</answer>", "stop", "0.5"), (1.0, True, True)),
    (("</think><answer>\\boxed{3}</answer> and on", "length", "3"), (0.0, True, True)),
    (("</think><answer>\\boxed{3}</answer>", "abort", "3"), (0.0, True, True)),
    (("the answer is 3", "stop", "3"), (0.0, False, False)),
    (("</think><answer>\\boxed{x+1}</answer>", "stop", "1+x"), (1.0, True, True)),
]


def make_rollouts() -> list[Rollout]:
    tokenizer = build_tokenizer()
    rollouts = []
    for number, ((text, finish_reason, answer), _) in enumerate(CASES):
        ids = tokenizer(text)["input_ids"]
        rollouts.append(
            Rollout(
                prompt=Prompt(prompt_id=number, token_ids=[1, 2], answer=answer, source="test"),
                response_ids=ids,
                rollout_log_probs=[-1.0] * len(ids),
                finish_reason=finish_reason,
                policy_version=4,
            )
        )
    return rollouts


def check_grading(num_ranks: int) -> None:
    """What one rank does. The number of rollouts is odd, so two ranks share them unevenly."""
    if num_ranks > 1:
        dist.init_process_group("gloo")
    rollouts, ranks = make_rollouts(), Ranks()
    assert ranks.size == num_ranks
    graded_here = []
    with AnswerVerifier(timeout_s=120.0, num_workers=1) as verifier:
        grader = ResponseGrader(verifier, build_tokenizer(), ranks)
        graded = grader.grade(rollouts, on_grade=lambda: graded_here.append(None))
        assert len(grader.grade(rollouts[:1])) == 1
        assert grader.grade([]) == []
    assert len(graded_here) == len(range(ranks.rank, len(rollouts), num_ranks))
    for rollout, before, (_, expected) in zip(graded, rollouts, CASES, strict=True):
        assert rollout.grade is not None
        assert (rollout.grade.reward, rollout.grade.is_correct, rollout.grade.is_formatted) == expected
        assert (rollout.prompt, rollout.response_ids) == (before.prompt, before.response_ids)
        assert (rollout.finish_reason, rollout.policy_version) == (before.finish_reason, before.policy_version)
        assert before.grade is None
    ranks.close()
    if num_ranks > 1:
        dist.destroy_process_group()


def test_only_finished_right_answers_are_rewarded() -> None:
    check_grading(1)


def test_two_ranks_grade_as_one_and_keep_the_order() -> None:
    run_ranks(2, check_grading, 2)


def test_the_kind_of_a_data_file_decides_how_its_responses_are_graded(tmp_path: Path) -> None:
    rows = [
        {"question": "1+1", "answer": "2"},
        {"question": "1+1?", "choices": ["1", "2"], "answer": "B"},
        {"question": "1+1?", "tests": [{"input": "", "output": "2"}]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_tokenizer()
    prompts, _ = load_prompts([path], tokenizer, template="short", max_prompt_tokens=1000)
    assert [prompt.kind for prompt in prompts] == ["math", "choice", "code"]
    ids = tokenizer("<answer>\\boxed{2}</answer>")["input_ids"]
    fields = {"response_ids": ids, "rollout_log_probs": [0.0] * len(ids), "policy_version": 0}
    rollouts = [Rollout(prompt=prompt, finish_reason="stop", **fields) for prompt in prompts]  # type: ignore[arg-type]
    with AnswerVerifier(timeout_s=120.0, num_workers=1) as verifier:
        graded = ResponseGrader(verifier, tokenizer, Ranks()).grade(rollouts)
    grades = [rollout.grade for rollout in graded if rollout.grade is not None]
    assert [(grade.reward, grade.extracted) for grade in grades] == [(1.0, "2"), (0.0, "2"), (0.0, None)]
