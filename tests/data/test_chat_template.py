"""A chat template writes the training prompt's very tokens, in transformers with the demo's own tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError

from megatron_orz.data.chat_template import chat_template
from megatron_orz.data.prompts import TEMPLATES, render
from megatron_orz.data.synthetic import build_tokenizer

TOKENIZER = build_tokenizer()
AWKWARD = 'a "quoted" \\boxed{} line\r\n\t{% raw %}{{ messages }} ünï😀\x0b {problem}{bos_token}\n {problem} \n\n'
"""What means something to Jinja, to Python or to a line editor."""


def ids(messages: list[dict[str, str]], template: str, **options: Any) -> list[int]:
    return TOKENIZER.apply_chat_template(
        messages, chat_template=chat_template(template), tokenize=True, return_dict=False, **options
    )


@given(problem=st.text(), template=st.sampled_from([*TEMPLATES, AWKWARD]), is_prompt=st.booleans())
@example(problem="{{ 7 * 7 }} {% raw %} \\frac{a}{b} {bos_token} {problem}\n\n", template="orz", is_prompt=True)
@example(problem="\n 'x' \"y\" \\n", template=AWKWARD, is_prompt=False)
def test_a_user_message_becomes_the_training_prompt(problem: str, template: str, is_prompt: bool) -> None:
    expected = TOKENIZER(render(template, problem), add_special_tokens=False)["input_ids"]
    assert ids([{"role": "user", "content": problem}], template, add_generation_prompt=is_prompt) == expected


def test_the_bos_token_stands_where_the_prompt_has_it() -> None:
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<answer>"
    messages = [{"role": "user", "content": "2+2"}]
    text = tokenizer.apply_chat_template(messages, chat_template=chat_template("orz"), tokenize=False)
    assert text == render("orz", "2+2", bos_token="<answer>")
    assert text.startswith("<answer>A conversation")


def test_a_response_follows_its_prompt_and_ends_in_the_eos_token() -> None:
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": " 4\n"}]
    assert TOKENIZER.decode(ids(messages, "short")) == "User: 2+2\nAssistant: <think> 4\n<|endoftext|>"


@pytest.mark.parametrize(
    "roles", [[], ["system", "user"], ["assistant"], ["user", "user"], ["user", "assistant", "user"]], ids="-".join
)
def test_a_conversation_unlike_any_of_the_training_is_refused(roles: list[str]) -> None:
    messages = [{"role": role, "content": "hello"} for role in roles]
    template = chat_template("short")
    with pytest.raises(TemplateError, match="trained on one user message, and answers it; send that message alone"):
        TOKENIZER.apply_chat_template([messages], chat_template=template, tokenize=False)
