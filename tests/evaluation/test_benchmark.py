"""Which rows of a file become items, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.evaluation.benchmark import Benchmark, load_benchmark
from megatron_orz.types import AnswerKind

GOOD = {"question": "1+1", "answer": "2"}


def load(path: Path, *lines: object, **options: object) -> Benchmark:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    settings = {"template": "short", "max_prompt_tokens": 64, **options}
    return load_benchmark(path, build_tokenizer(), **settings)  # type: ignore[arg-type]


def test_bad_rows_are_named_and_counted_and_the_others_are_asked(tmp_path: Path) -> None:
    lines = [
        GOOD,
        b"{oops",
        {"question": "1+2"},
        {"question": "1+3", "answer": ""},
        {"question": "1+4", "answer": "\xe9".encode("latin1").decode("latin1")},
        b'{"question": "1+5", "answer": "\xe9"}',
        GOOD,
        {"question": "1+" * 5_000_000 + "1", "answer": "3"},
        {"question": "2+2", "answer": 4, "level": 1},
    ]
    benchmark = load(tmp_path / "sums.jsonl", *lines)
    assert [item.problem.text for item in benchmark.items] == ["1+1", "1+4", "2+2"]
    assert [item.prompt.answer for item in benchmark.items] == ["2", "é", "4"]
    assert benchmark.name == "sums"
    sentences = {
        2: "malformed JSON",
        3: "no column 'answer'",
        4: "empty",
        6: "not UTF-8",
        7: "the same as",
        8: "characters exceed max_prompt_tokens 64",
    }
    assert len(benchmark.dropped) == len(sentences)
    for sentence, (line, cause) in zip(
        sorted(benchmark.dropped, key=lambda text: int(text.split("line ")[1].split(":")[0])),
        sentences.items(),
        strict=True,
    ):
        assert f"sums.jsonl: line {line}:" in sentence
        assert cause in sentence


def test_a_file_without_answers_is_an_error_that_says_so(tmp_path: Path) -> None:
    rows = [{"question": f"1+{number}"} for number in range(5)]
    with pytest.raises(ValueError, match=r"none of its 5 rows .* line 1: has no column 'answer'"):
        load(tmp_path / "sums.jsonl", *rows)
    with pytest.raises(ValueError, match="none of its 0 rows"):
        load(tmp_path / "empty.jsonl")


def test_strict_loading_ends_at_the_first_bad_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: has no column"):
        load(tmp_path / "sums.jsonl", GOOD, {"question": "1"}, b"{", is_strict=True)


def test_items_keep_their_keys_whatever_stands_around_them(tmp_path: Path) -> None:
    alone = load(tmp_path / "a.jsonl", {"question": "3+3", "answer": "6"})
    among = load(tmp_path / "b.jsonl", GOOD, b"bad", {"question": "3+3", "answer": "6"})
    assert alone.items[0].key == among.items[1].key
    assert among.items[0].key != among.items[1].key
    assert [item.problem.text for item in load(tmp_path / "b.jsonl", GOOD, {**GOOD, "answer": "3"}).items] == [
        "1+1"
    ] * 2
    assert len(load(tmp_path / "b.jsonl", GOOD, {"question": "9", "answer": "9"}, max_items=1).items) == 1


def test_items_of_every_kind_are_graded_in_their_way(tmp_path: Path) -> None:
    benchmark = load(
        tmp_path / "mixed.jsonl",
        GOOD,
        {"question": "1+1?", "choices": ["2", "3"], "answer": 0},
        {"question": "1+1?", "tests": [{"input": "", "output": "2"}]},
        max_prompt_tokens=10_000,
    )
    kinds: list[AnswerKind] = ["math", "choice", "code"]
    assert [item.prompt.kind for item in benchmark.items] == kinds
