"""Conversations in files: both forms, and the line, the rule and the remedy for each bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.data.conversations import read_conversations

USER, ASSISTANT = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl",
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "id": 3},
        "",
        {"prompt": "2+2", "response": 4},
    )
    first, second = read_conversations(path)
    assert [(m.role, m.content) for m in first.messages] == [
        ("system", "Be brief."),
        *[("user", "2+2"), ("assistant", "4")] * 2,
    ]
    assert [(m.role, m.content) for m in second.messages] == [("user", "2+2"), ("assistant", "4")]
    assert (first.place, second.place) == (f"{path}: line 1", f"{path}: line 3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"malformed JSON \(.*; correct it or remove it"),
        ([USER, ASSISTANT], r"holds no conversation; write \{\"messages\": \[\.\.\.\]\} or .*"),
        ({"prompt": "2+2"}, r"holds no conversation; write .*"),
        ({"messages": "2+2"}, r"holds no conversation; write .*"),
        ({"messages": []}, r"the roles none are not user and assistant in turns, .*; end it with .*"),
        ({"messages": [USER]}, r"the roles user are not user and assistant in turns, .*"),
        ({"messages": [SYSTEM, ASSISTANT]}, r"the roles system, assistant are not .*"),
        ({"messages": [USER, ASSISTANT, SYSTEM, USER, ASSISTANT]}, r"the roles user, assistant, system, .*"),
        ({"messages": [USER, USER, ASSISTANT]}, r"the roles user, user, assistant are not .*"),
        ({"messages": [USER, {"role": "tool", "content": "4"}]}, r"message 2 is not an object with .*; correct it"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 2 is not an object with a content .*"),
        ({"messages": ["2+2", "4"]}, r"message 1 is not an object with .*"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"the content of message 2 is empty; fill it .*"),
        (
            {"messages": [USER, {"role": "assistant", "content": ["4"]}]},
            r"the content of message 2 \['4'\] is neither .*",
        ),
        ({"prompt": "2+2", "response": None}, r"the response None is neither text nor a number; correct or remove it"),
        ({"prompt": "\ud800", "response": "4"}, r"the prompt holds a lone surrogate .*; save it as UTF-8"),
    ],
)
def test_a_bad_row_is_named_with_the_rule_and_the_remedy(row: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "1+1", "response": "2"}, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line 2: {message}"):
        list(read_conversations(path))


def test_files_that_hold_no_conversations_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file; check data\.train and data\.held_out"):
        list(read_conversations(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"rows\.json: conversations are read from \.jsonl files; write one .*"):
        list(read_conversations(written(tmp_path / "rows.json", [])))
    with pytest.raises(ValueError, match=r"rows\.jsonl: holds no conversations; remove it .*, or fill it"):
        list(read_conversations(written(tmp_path / "rows.jsonl", "", "  ")))
