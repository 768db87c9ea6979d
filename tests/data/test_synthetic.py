"""Arithmetic problems, their partly wrong solutions, and the tokenizer that goes with them."""

import json
import os
import random
import string
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, Qwen2Config

from megatron_orz.data.conversations import read_conversations
from megatron_orz.data.reading import read_problems
from megatron_orz.data.synthetic import (
    ArithmeticTask,
    build_tokenizer,
    count_problems,
    make_problems,
    solve,
    write_conversations,
    write_problems,
    write_solution,
)

TOKENIZER = build_tokenizer()
WORDS = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "User:", "Assistant:"]
ASCII = string.digits + string.ascii_letters + string.punctuation + " \n"


def is_valid(problem: str, task: ArithmeticTask) -> bool:
    """By the definition: the terms are in range and Python's own value of every prefix is not negative."""
    terms = problem.replace("-", "+").split("+")
    prefixes = [problem[:end] for end in range(1, len(problem) + 1) if problem[:end][-1].isdigit()]
    fewest, most = task.num_terms
    return (
        fewest <= len(terms) <= most
        and all(1 <= int(term) <= task.max_term for term in terms)
        and all(eval(prefix) >= 0 for prefix in prefixes)
    )


def test_problems_are_valid_distinct_and_split_without_overlap() -> None:
    task = ArithmeticTask(num_terms=(2, 4))
    train, held_out = make_problems(task, num_train=3000, num_held_out=200, seed=0)
    assert (len(train), len(held_out)) == (3000, 200)
    assert len({*train, *held_out}) == 3200
    assert all(is_valid(problem, task) for problem in train + held_out)
    assert all(solve(problem) == eval(problem) for problem in train)


def test_problems_depend_on_the_seed_alone() -> None:
    task = ArithmeticTask()
    train, held_out = make_problems(task, num_train=50, num_held_out=20, seed=0)
    assert make_problems(task, num_train=50, num_held_out=20, seed=0) == (train, held_out)
    assert make_problems(task, num_train=50, num_held_out=20, seed=1)[0] != train


def test_held_out_problems_are_as_long_as_the_training_problems() -> None:
    """Distinct draws run out of short chains: what is drawn first is shorter than what is drawn last."""
    task = ArithmeticTask(num_terms=(2, 4))
    shares = [
        sum(len(problem) == 3 for problem in problems) / len(problems)
        for problems in make_problems(task, num_train=4000, num_held_out=1000, seed=0)
    ]
    standard_error = (shares[0] * (1 - shares[0]) / 1000) ** 0.5
    assert shares[1] == pytest.approx(shares[0], abs=4 * standard_error)


def test_problems_are_counted_and_can_all_be_drawn() -> None:
    task = ArithmeticTask(num_terms=(2, 3), max_term=3)
    every = {
        "".join(parts)
        for length in (2, 3)
        for parts in product(*([["1", "2", "3"]] + [["+1", "+2", "+3", "-1", "-2", "-3"]] * (length - 1)))
        if is_valid("".join(parts), task)
    }
    assert count_problems(task) == len(every)
    train, held_out = make_problems(task, num_train=len(every) - 5, num_held_out=5, seed=0)
    assert {*train, *held_out} == every
    with pytest.raises(ValueError, match=f"{len(every) + 1} problems asked for, and only {len(every)} exist; raise"):
        make_problems(task, num_train=len(every), num_held_out=1, seed=0)


def test_solution_without_errors_is_the_documented_one() -> None:
    task = ArithmeticTask(step_error=0.0, format_error=0.0)
    expected = "7+8=15\n15-3=12\n12+9=21</think><answer>\\boxed{21}</answer>"
    assert write_solution("7+8-3+9", task, random.Random(0)) == expected


def test_solutions_err_as_often_as_asked_and_carry_on_from_their_own_totals() -> None:
    task = ArithmeticTask(step_error=0.3, format_error=0.2)
    rng = random.Random(0)
    problems, _ = make_problems(task, num_train=2000, num_held_out=0, seed=0)
    num_steps = num_wrong = num_broken = 0
    for problem in problems:
        thinking, answer = write_solution(problem, task, rng).split("</think>")
        steps = [line.split("=") for line in thinking.split("\n")]
        for left, written in steps:
            num_steps += 1
            right, total = eval(left), int(written)
            num_wrong += total != right
            assert total == right or (total >= 0 and abs(total - max(right, 0)) <= 3)
        for (_, written), (left, _) in pairwise(steps):
            assert left[: max(left.rfind("+"), left.rfind("-"))] == written
        final = steps[-1][1]
        num_broken += answer != f"<answer>\\boxed{{{final}}}</answer>"
        assert final in answer
    # Five standard deviations: sqrt(0.3 * 0.7 / 6000) = 0.006 and sqrt(0.2 * 0.8 / 2000) = 0.009.
    assert abs(num_wrong / num_steps - 0.3) < 0.03
    assert abs(num_broken / len(problems) - 0.2) < 0.045


def test_conversations_are_problems_and_solutions(tmp_path: Path) -> None:
    path = tmp_path / "conversations.jsonl"
    write_conversations(path, ["1+2-3", "4+5"], ArithmeticTask(step_error=0.0, format_error=0.0), seed=0)
    [first, second] = [[message.content for message in row.messages] for row in read_conversations(path)]
    assert first == ["1+2-3", "1+2=3\n3-3=0</think><answer>\\boxed{0}</answer>"]
    assert second == ["4+5", "4+5=9</think><answer>\\boxed{9}</answer>"]


def test_problem_files_are_read_back_and_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_problems(path, ["1+2", "9-4+3"])
    assert [(problem.text, problem.answer) for problem in read_problems(path)] == [("1+2", "3"), ("9-4+3", "8")]
    assert json.loads(path.read_text().splitlines()[0]) == {"question": "1+2", "answer": "3"}

    def broken():
        yield "1+1"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_problems(path, broken())
    assert len(path.read_text().splitlines()) == 2
    assert os.listdir(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_terms": (5, 3)}, r"num_terms \(5, 3\) must be a range that starts at 2 or more"),
        ({"step_error": 1.5}, r"step_error 1.5 is outside \[0, 1\]"),
        ({"max_term": 0}, "max_term 0 is not at least 1"),
    ],
)
def test_impossible_tasks_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArithmeticTask(**wrong)


@given(text=st.lists(st.sampled_from([*WORDS, *ASCII]) | st.text(ASCII, max_size=5), max_size=20).map("".join))
@example(text=ASCII)
@example(text="  two  spaces , and 'm \n\n ")
def test_tokenizer_gives_every_ascii_text_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    stream = DecodeStream(skip_special_tokens=True)  # as servers decode, token by token
    assert "".join(stream.step(TOKENIZER._tokenizer, token) or "" for token in ids) == text


def test_tags_are_single_ordinary_tokens() -> None:
    for word in WORDS:
        [token] = TOKENIZER(word)["input_ids"]
        assert token not in TOKENIZER.all_special_ids
    text = "User: 12\nAssistant: <think>"
    pieces = [TOKENIZER.decode([token]) for token in TOKENIZER(text)["input_ids"]]
    assert pieces == ["User:", " ", "1", "2", "\n", "Assistant:", " ", "<think>"]


def test_special_tokens_end_and_pad_and_nothing_begins() -> None:
    assert TOKENIZER.bos_token is None
    assert TOKENIZER.eos_token == TOKENIZER.pad_token == "<|endoftext|>"
    assert TOKENIZER("1", add_special_tokens=True)["input_ids"] == TOKENIZER("1", add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode([TOKENIZER.eos_token_id], skip_special_tokens=True) == ""


def test_saved_tokenizer_reloads_equal_beside_a_qwen2_config(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)  # makes AutoTokenizer choose the class by the model's family
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == TOKENIZER.get_vocab()
    assert reloaded.special_tokens_map == TOKENIZER.special_tokens_map
    text = "User: 1+2 \nAssistant: <think>1+2=3</think><answer>\\boxed{3}</answer>"
    ids = reloaded(text)["input_ids"]
    assert ids == TOKENIZER(text)["input_ids"]
    assert reloaded.decode(ids) == text
