"""Which tokens of a conversation are learnt, by the tokenizer's chat template and by a prompt of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_orz.data.demonstrations import load_demonstrations, resolve_chat_template
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.types import Demonstration

TOKENIZER = build_tokenizer()
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
"""As chat models have them: a mark ends each turn, and a line break follows it."""
FORGETFUL = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '...' }}")
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TWO_TURNS = [
    *(message("system", "S"), message("user", "2+2"), message("assistant", "4")),
    *(message("user", "3+3"), message("assistant", "6")),
]


def load(tmp_path: Path, rows: list[Any], template: str, **options: Any) -> tuple[list[Demonstration], str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"learn": "responses", "max_tokens": 200} | options
    demonstrations, report = load_demonstrations([path], TOKENIZER, template=template, **settings)
    return demonstrations, str(report)


def learnt(demonstration: Demonstration) -> list[str]:
    """The stretches of text that are learnt."""
    stretches, last = [], None
    for position, (token, is_learnt) in enumerate(zip(demonstration.token_ids, demonstration.loss_mask, strict=True)):
        if is_learnt:
            if last != position - 1:
                stretches.append([])
            stretches[-1].append(token)
            last = position
    return [TOKENIZER.decode(stretch) for stretch in stretches]


def test_of_a_chat_the_responses_are_learnt_with_the_marks_that_end_them(tmp_path: Path) -> None:
    [demonstration], report = load(tmp_path, [{"messages": TWO_TURNS}], CHAT)
    whole = TOKENIZER.apply_chat_template(TWO_TURNS, chat_template=CHAT, tokenize=False)
    assert TOKENIZER.decode(demonstration.token_ids) == whole
    assert demonstration.token_ids == TOKENIZER(whole)["input_ids"]
    assert learnt(demonstration) == ["4<|endoftext|>", "6<|endoftext|>"]
    assert (
        report == f"1 conversations of 1 rows (0 too long), {len(demonstration.token_ids)} tokens, 4 of them to learn"
    )


def test_of_a_prompt_the_one_response_is_learnt_with_the_eos_token(tmp_path: Path) -> None:
    template = resolve_chat_template("short", TOKENIZER)
    [demonstration], _ = load(tmp_path, [{"prompt": "2+2", "response": "4</think>"}], template)
    assert TOKENIZER.decode(demonstration.token_ids) == "User: 2+2\nAssistant: <think>4</think><|endoftext|>"
    assert learnt(demonstration) == ["4</think><|endoftext|>"]


def test_a_template_that_ends_no_turn_gets_the_eos_token_after_the_last(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    [demonstration], _ = load(tmp_path, [{"messages": TWO_TURNS}], plain)
    assert TOKENIZER.decode(demonstration.token_ids) == "S2+243+36<|endoftext|>"
    assert learnt(demonstration) == ["4", "6<|endoftext|>"]


def test_all_tokens_but_the_first_are_learnt_where_that_is_asked_for(tmp_path: Path) -> None:
    [demonstration], _ = load(tmp_path, [{"messages": TWO_TURNS}], CHAT, learn="all")
    assert demonstration.loss_mask == [False] + [True] * (len(demonstration.token_ids) - 1)


def test_long_conversations_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2", "response": "4" * length} for length in (1, 30, 5)]
    demonstrations, report = load(tmp_path, rows, CHAT, max_tokens=40)
    assert len(demonstrations) == 2
    assert report.startswith("2 conversations of 3 rows (1 too long), ")


def test_what_a_template_cannot_write_is_refused_with_its_line(tmp_path: Path) -> None:
    good = {"prompt": "2+2", "response": "4"}
    with pytest.raises(ValueError, match=r"line 2: the chat template refuses the conversation \(no system\); correct"):
        load(tmp_path, [good, {"messages": TWO_TURNS}], REFUSING)
    with pytest.raises(ValueError, match=r"line 2: the chat template does not write what was said before .*; make a"):
        load(tmp_path, [good, {"messages": TWO_TURNS}], FORGETFUL)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.template is tokenizer, but .* has no chat template; set it to a"):
        resolve_chat_template("tokenizer", TOKENIZER)
